"""The routing of a text as a terminal shows it."""

import re

import pytest
from rich.cells import cell_len
from toy_checkpoints import routed

from sparse_ft.evaluation.token_table import token_table


def rows_of(text):
    """Return the lines of all tables of tokens, by their first cell."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    start = next(place for place, cells in enumerate(lines) if cells[0] == "token")
    found = {}
    for cells in lines[start:]:
        found.setdefault(cells[0], []).extend(cells[1:])
    return found


@pytest.mark.parametrize("num_experts", [2, 3, 16])
@pytest.mark.parametrize("width", [30, 120])
def test_every_cell_names_the_experts_of_its_token_with_their_weights(num_experts, width):
    view = routed(num_experts, 6)
    rows = rows_of(token_table(view, width=width))
    assert rows["token"] == [f"block {block}" for block in view.blocks]
    for place, token in enumerate(view.tokens):
        for cell, weights in zip(rows[token.text], view.weights[:, place], strict=True):
            shown = {ord(part[0]) - ord("A"): int(part[1:]) for part in cell.split(" ")}
            assert len(shown) == 2
            for expert, weight in shown.items():
                assert weight / 100 == pytest.approx(float(weights[expert]), abs=0.0051)
            assert list(shown.values()) == sorted(shown.values(), reverse=True)


def test_lines_are_aligned_and_no_wider_than_the_terminal():
    text = token_table(routed(16, 12, texts=["x" * 60, "上海" * 20, "a"]), width=80)
    tables = text.split("\n\n")[3:]
    assert len(tables) > 1
    for table in tables:
        lines = table.splitlines()
        assert max(map(cell_len, lines)) <= 80
        assert len({cell_len(line[: line.rindex("  ")]) for line in lines[:1]}) == 1
    assert "x…" in text
    assert "海…" in text or "上…" in text


def test_a_narrow_terminal_gets_one_block_a_table():
    rows = rows_of(token_table(routed(2, 4), width=1))
    assert rows["token"] == ["block 1", "block 2", "block 3", "block 4"]


def test_many_experts_in_a_cell_are_counted():
    view = routed(6, 1, top_k=5)
    rows = rows_of(token_table(view))
    assert all(re.fullmatch(r"([A-F]\d+ ){3}\+2", cell) for cell in rows["Ada"])
    assert "+2: two more experts have less." in token_table(view)
    assert "+2" not in token_table(routed(3))


def test_experts_have_a_legend_with_mean_weights():
    view = routed(28, 1)
    lines = token_table(view).splitlines()
    assert "A   expert_0" in "\n".join(lines)
    assert [line.split()[:2] for line in lines if line.startswith(("Z ", "AA", "AB"))] == [
        ["Z", "expert_25"], ["AA", "expert_26"], ["AB", "expert_27"],
    ]  # fmt: skip
    (first,) = [line.split() for line in lines if line.split()[1:2] == ["expert_3"]]
    assert float(first[2]) == pytest.approx(view.usage["expert_3"], abs=0.0051)


def test_one_choice_for_the_text_is_said_once():
    text = token_table(routed(3, by_token=False))
    assert "one routing for the whole text, the same for all its tokens in all blocks (4 tokens, blocks 1 to 3)" in text
    assert "block 2" not in text
    assert len(text.splitlines()) == 6


def test_one_expert_and_no_expert():
    one = routed(1, 1, texts=["a"])
    assert token_table(one) == "There is one expert, expert_0, so there is nothing to choose (1 token, block 1)."
    view = routed(2)
    view.weights.zero_()
    text = token_table(view)
    assert "No expert was chosen: the text goes through the bare backbone." in text
    assert set(rows_of(text)["Ada"]) == {"-"}


def test_what_would_break_the_table_is_escaped():
    text = token_table(routed(2, texts=["\n", " the", "\x1b[1m", " "]))
    assert {"\\n", "the", "\\x1b[1m"} <= set(rows_of(text))
    assert "\x1b" not in text
