"""Text in columns."""

import pytest
from rich.cells import cell_len

from sparse_ft.evaluation.tables import markdown_table, printable, text_table


@pytest.mark.parametrize("text", ["cat", "北京", "e\u0301", "😀", "❤\ufe0f", "[red]", ":smile:"])
def test_columns_are_as_wide_as_their_widest_cell_in_a_terminal(text):
    lines = text_table(["name", "rows"], [[text, "1"], ["a" * 9, "100"]], [["sum", "101"]], min_width=5, ruled=True)
    assert [cell_len(line) for line in lines] == [16] * 6
    assert text in lines[2]
    assert lines[1] == lines[4] == "-" * 16


def test_text_columns_are_aligned_left_and_numbers_right():
    assert text_table(["n", "x"], [["北京", "1"], ["a", "100"]]) == ["n       x", "北京    1", "a     100"]
    assert markdown_table(["n", "x"], [["北京", "1"], ["a", "100"]]) == [
        "| n    |   x |", "| ---- | --: |", "| 北京 |   1 |", "| a    | 100 |",
    ]  # fmt: skip


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "NO_COLOR", "COLUMNS"])
def test_a_terminal_and_its_settings_change_nothing(monkeypatch, variable):
    monkeypatch.setenv(variable, "9")
    assert text_table(["a"], [["x" * 300]]) == ["a", "x" * 300]


def test_what_would_break_a_line_is_escaped():
    assert printable("a\nb\t\u200d\x1b[1m") == "a\\nb\\t\\u200d\\x1b[1m"
    assert printable("") == "''"
    assert printable("\ud83d") == "\\ud83d"
