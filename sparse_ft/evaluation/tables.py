"""Text in columns, for a terminal or as Markdown; the same whether or not the output is a terminal."""

from collections.abc import Sequence
from io import StringIO

from rich.box import MARKDOWN, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_RULED = Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
"""Dashes below the header and above the footer, blanks between columns."""


def printable(text: str) -> str:
    """Escape characters that would break a line or the terminal; write an empty text as ``''``."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return shown or "''"


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[Sequence[str]] = (),
    *,
    num_text_columns: int = 1,
    min_width: int = 0,
    ruled: bool = False,
) -> list[str]:
    """Lay out a table for a terminal, two blanks between columns, and return its lines.

    Args:
        header: Names of the columns.
        rows: Cells, free of characters that ``printable`` escapes.
        footer: Rows at the bottom.
        num_text_columns: Columns at the left whose cells are aligned left; all others are aligned right.
        min_width: Terminal columns of the others, at least.
        ruled: Whether dashes separate the header and the footer from the rows.
    """
    return _lines(header, rows, footer, num_text_columns, min_width, box=_RULED if ruled else None)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> list[str]:
    """Lay out a table as Markdown; the arguments are those of ``text_table``, the cells escaped."""
    lines = _lines(header, rows, (), num_text_columns, 3, box=MARKDOWN)
    rules = [
        f" {dashes[2:]} " if column < num_text_columns else f" {dashes[3:]}: "
        for column, dashes in enumerate(lines[1].split("|")[1:-1])
    ]
    return [lines[0], f"|{'|'.join(rules)}|", *lines[2:]]


def _lines(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[Sequence[str]],
    num_text_columns: int,
    min_width: int,
    *,
    box: Box | None,
) -> list[str]:
    edged, between = box is MARKDOWN, 2 if box is None else 1  # a box adds a character of its own
    table = Table(box=box, padding=(0, between, 0, int(edged)), show_edge=edged, pad_edge=edged)
    for column, name in enumerate(header):
        if column < num_text_columns:
            table.add_column(Text(name), no_wrap=True)
        else:
            table.add_column(Text(name), no_wrap=True, justify="right", min_width=min_width)
    for row in rows:
        table.add_row(*map(Text, row))
    if rows:
        table.add_section()
    for row in footer:
        table.add_row(*map(Text, row))
    stream = StringIO()
    Console(file=stream, width=1_000_000, color_system=None).print(table)
    lines = stream.getvalue().splitlines()
    return [line.rstrip() for line in lines if line.strip()]  # Markdown has edges of blanks
