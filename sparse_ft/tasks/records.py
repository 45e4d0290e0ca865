r"""Records: rows of any source. How data files are located and decoded, and how values become text.

Lines end at ``\n`` only: U+2028, U+0085 and the like occur inside texts and as tokens.
"""

import difflib
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ft.documents import decode
from sparse_ft.errors import DataError, name_list
from sparse_ft.tasks.spec import Column
from sparse_ft.tasks.values import exact_text

_REST = re.compile(r"(\d+)\.\.")
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "review", "content", "body", "message", "utterance", "comment", "document", "tweet"),
    "label": ("category", "class", "target", "sentiment", "intent", "labels", "topic"),
    "labels": ("label", "categories", "tags", "topics"),
    "tokens": ("words", "token", "word", "text"),
    "tags": ("ner_tags", "labels", "tag", "ner", "label"),
    "spans": ("entities", "ents", "labels"),
}
"""Names that other data sets give to our columns, lower case, for suggestions."""
QUESTION = "question"
"""Noun of a record that is one of several questions about a text; questions are counted through the file."""
SENTENCE = "sentence at line"
"""Noun of a record whose words stand on separate lines, from line ``number`` on."""


class Record(NamedTuple):
    """One row of a source, and its location for messages."""

    values: dict[str, Any] | list[Any]
    """Values by column name, or by position where the source has no names."""
    path: str
    number: int
    """1-based number of the line, record, row …"""
    noun: str = "line"
    """Noun that ``number`` counts."""
    row: int = 0
    """0-based index of the row in its split, before any row is left out."""

    @property
    def location(self) -> str:
        """The file and the line, for messages."""
        return f"{self.path!r}, {self.noun} {self.number}"


class FileOptions(NamedTuple):
    """The layout of a file, as far as its format leaves it open."""

    columns: dict[str, Column]
    """Our column to the source's; readers of ``conll`` and ``lines`` read no other columns."""
    separator: str | None = None
    """Column separator of ``conll``; None is any run of spaces and tabs."""
    header: bool | None = True
    """Whether the first row of a ``csv`` or ``tsv`` is a header; None: if it holds the name of a wanted column."""
    key: str | None = None
    """Key of a ``json`` object that holds the list of rows."""


def locate(folder: Path, name: str) -> Path:
    """Find a file by its name, compressed or not.

    Raises:
        DataError: With the full paths that were tried.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"Data file {str(folder / name)!r} does not exist, nor does {name + '.gz'!r} beside it. "
        "Give the folder that holds it with --data, or name another file in the task file."
    )


def read_text(path: Path) -> str:
    r"""Read a UTF-8 file; decompress ``.gz``, drop a byte-order mark, and write ``\n`` where only ``\r`` ends lines.

    Raises:
        DataError: If the file cannot be read, is a broken gzip or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"Data file {str(path)!r} is not a whole gzip file ({error}). Fetch it again, or unzip it and drop the .gz."
        ) from error
    except OSError as error:
        raise DataError(
            f"Data file {str(path)!r} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    text = decode(data, f"Data file {str(path)!r}", error=DataError)
    return text if "\n" in text else text.replace("\r", "\n")  # the line ends of old Macs and of some spreadsheets


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield 1-based line numbers and lines without their end."""
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        yield number, line.removesuffix("\r")


def pick(record: Record, column: Column) -> Any:
    """Return the value of a column.

    Args:
        record: A record.
        column: A name; a position (negative from the end); ``"1.."`` for position 1 and all after it, joined by a
            space; or a list of columns, joined by a space, without those that are null. Lists in joined columns are
            joined, too.

    Raises:
        DataError: If there is no such column, with the columns that exist; or if a joined value is no text.
    """
    if isinstance(column, list):
        parts = [value for value in (pick(record, part) for part in column) if value is not None]
        return " ".join(_joined(value, record.location) for value in parts) if parts else None
    values = record.values
    if isinstance(column, str) and isinstance(values, dict) and column in values:
        return values[column]
    in_order = list(values.values()) if isinstance(values, dict) else values
    rest = _REST.fullmatch(column) if isinstance(column, str) else None
    if rest and int(rest[1]) < len(in_order):
        return " ".join(_joined(value, record.location) for value in in_order[int(rest[1]) :])
    if isinstance(column, int) and -len(in_order) <= column < len(in_order):
        return in_order[column]
    raise DataError(_missing_column(record, column))


def _missing_column(record: Record, column: str | int) -> str:
    if isinstance(record.values, dict):
        names, there = list(record.values), f"The columns are: {name_list(list(record.values))}."
    else:
        names = [value for value in record.values if isinstance(value, str)] if record.number == 1 else []
        there = f"There are {len(record.values)} columns, without names."
        if names and isinstance(column, str):
            there = f"No column of the first line has this name: {', '.join(repr(name[:40]) for name in names)}."
    if len(names) == 1 and (mark := next((mark for mark in (";", "\t", "|") if mark in names[0]), None)):
        return (
            f"No column {column!r} in {record.location}. The only column is {names[0]!r}. If {mark!r} divides columns, "
            "write commas in a .csv file and tabs in a .tsv file."
        )
    close = _close_name(str(column), names) if isinstance(column, str) else None
    hint = f" Did you mean {close!r}? Then write `columns: {{{column}: {close}}}`." if close else ""
    return (
        f"No column {column!r} in {record.location}.{hint} {there} Name the columns in the task file under `columns`."
    )


def _close_name(column: str, names: Sequence[str]) -> str | None:
    """Return the name that a source is likely to give one of our columns."""
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    usual = next((by_lower[name] for name in (column, *USUAL_NAMES.get(column, ())) if name in by_lower), None)
    close = difflib.get_close_matches(column, by_lower, n=1)
    return usual or (by_lower[close[0]] if close else None)


def _joined(value: Any, location: str) -> str:
    """Write a value of a joined column as text."""
    return " ".join(exact_text(item, "text", location) for item in (value if isinstance(value, list) else [value]))


def plain_text(value: Any) -> str:
    """Write any value as text, to compare rows; the items of a list are joined by one space."""
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def split_tokens(line: str, separator: str | None = None) -> list[str]:
    """Split at the separator, by default at runs of spaces and tabs; other Unicode white space may be a token."""
    return line.split(separator) if separator else re.split(r"[ \t]+", line.strip(" \t"))
