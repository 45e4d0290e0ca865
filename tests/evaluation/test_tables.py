"""Text in columns."""

import pytest

from sparse_ft.evaluation.tables import align, printable, terminal_width


@pytest.mark.parametrize(
    ("text", "width"), [("", 0), ("cat", 3), ("北京", 4), ("e\u0301", 1), ("😀", 2), ("❤\ufe0f", 1)]
)
def test_width_in_a_terminal(text, width):
    assert terminal_width(text) == width


def test_columns_are_as_wide_as_their_widest_cell():
    lines = align([["北京", "1"], ["a", "100"]], num_text_columns=1, min_width=2)
    assert lines == [["北京", "  1"], ["a   ", "100"]]


def test_what_would_break_a_line_is_escaped():
    assert printable("a\nb\t\u200d\x1b[1m") == "a\\nb\\t\\u200d\\x1b[1m"
    assert printable("") == "''"
    assert printable("\ud83d") == "\\ud83d"
