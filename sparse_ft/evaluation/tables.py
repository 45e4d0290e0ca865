"""Text in columns, as a terminal shows it."""

import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """Escape what would break a line or the terminal; name the empty label."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return shown or "''"


def terminal_width(text: str) -> int:
    """Count terminal columns: two for East Asian wide characters and emoji, none for marks on another character."""
    return sum(
        0 if unicodedata.category(c) in {"Mn", "Me"} else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def padded(text: str, width: int, *, left: bool) -> str:
    """Fill a text up with blanks to a width, on its right if it stands on the left."""
    fill = " " * (width - terminal_width(text))
    return text + fill if left else fill + text


def align(lines: Sequence[Sequence[str]], *, num_text_columns: int, min_width: int) -> list[list[str]]:
    """Pad the cells of all lines to the width of their column."""
    widths = [max(min_width, *map(terminal_width, column)) for column in zip(*lines, strict=True)]
    return [
        [
            padded(cell, width, left=column < num_text_columns)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
