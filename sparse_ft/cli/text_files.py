"""Rows for prediction from standard input and from files: lines, JSON Lines, CSV, TSV, a folder of texts."""

import csv
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sparse_ft.documents import decode, parse_json
from sparse_ft.errors import DataError
from sparse_ft.paths import similar_path, user_path
from sparse_ft.prediction.requests import EXPECTED, read_request

LineForm = Literal["text", "pair", "json"]
"""``text``: a line is a text; ``pair``: it may hold two, with a tab between them; ``json``: it is an object."""

_OTHER_FORMATS = (".json", ".parquet", ".xlsx", ".xls", ".gz", ".zip", ".docx", ".pdf")


def read_file(source: str, *, form: LineForm) -> Iterator[Any]:
    r"""Yield what ``LoadedModel.predict`` takes, row by row; no more than a row is in memory.

    ``.jsonl``, ``.csv`` and ``.tsv`` files hold rows with the column ``text``, and others that are passed on. A file
    of any other name holds a text a line: only ``\n`` (and ``\r\n``) ends a line, and an empty line is an empty text.

    Args:
        source: A file; a folder, of which every ``.txt`` file is one text; or ``-`` for standard input.
        form: How lines are read.

    Raises:
        DataError: If the source is missing, is not UTF-8, or holds something else.
    """
    if source == "-":
        yield from read_lines(map(_without_end, _lines(sys.stdin.buffer, "standard input")), form=form)
        return
    path, suffix = find_file(source), Path(source).suffix.lower()
    if path.is_dir():
        yield from _folder(path)
        return
    with _opened(path) as stream:
        lines = _lines(stream, repr(source))
        if suffix in _TABLES:
            yield from _table(lines, source, form=form)
        else:
            yield from read_lines(map(_without_end, lines), form="json" if suffix in {".jsonl", ".ndjson"} else form)


def find_file(source: str) -> Path:
    """Return the path of a file or folder to read.

    Raises:
        DataError: If there is none, or it has a format that is not read.
    """
    path = user_path(source)
    if not path.exists():  # a pipe will do
        advice = similar_path(path) or " Give a file with one text a line, or - for standard input."
        raise DataError(f"File {source!r} does not exist.{advice}")
    if path.suffix.lower() in _OTHER_FORMATS and not path.is_dir():
        raise DataError(
            f"File {source!r} holds no lines of text. Expected a text a line, .jsonl, .csv, .tsv, or a folder of .txt "
            "files. Convert it."
        )
    return path


def read_lines(lines: Iterable[str], *, form: LineForm) -> Iterator[Any]:
    """Yield what ``LoadedModel.predict`` takes for each line; blank lines among JSON objects are passed over.

    Raises:
        DataError: If a line is no such object.
    """
    for number, line in enumerate(lines, start=1):
        if form == "json":
            if line.strip():
                where = f"Line {number}"
                yield _checked(parse_json(line, where, error=_expecting(line)), where, line)
        else:
            yield tuple(line.split("\t", 1)) if form == "pair" and "\t" in line else line


def _expecting(line: str) -> Callable[[str], DataError]:
    return lambda problem: DataError(f"{problem} {line[:60]!r}. {EXPECTED}")


def _checked(row: Any, where: str, line: str) -> Any:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object: {line[:60]!r}. {EXPECTED}")
    try:
        read_request(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return row


def _folder(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the text of every file, in the order of their names; the field ``file`` is the name."""
    files = sorted(file for file in folder.rglob("*.txt") if file.is_file())
    if not files:
        raise DataError(f"Folder {str(folder)!r} has no .txt file. Give a folder with one text a file, or a file.")
    for file in files:
        with _opened(file) as stream:
            text = decode(stream.read(), repr(str(file)), error=DataError)
        yield {"file": file.relative_to(folder).as_posix(), "text": _without_end(text)}


def _table(lines: Iterator[str], source: str, *, form: LineForm) -> Iterator[Any]:
    """Yield the rows of a CSV or TSV file by the names of its columns.

    The lines of a TSV file without the name ``text`` are read as those of any other file where a tab parts a pair.
    """
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is less than a long text has
    split = _TABLES[Path(source).suffix.lower()]
    first = next(lines, "")
    rows = split(itertools.chain([first], lines))
    header = next(rows, [])
    if "text" not in header:
        if not first or (split is _tab_rows and (form == "pair" or len(header) == 1)):
            yield from read_lines(map(_without_end, itertools.chain([first] if first else [], lines)), form=form)
            return
        raise DataError(
            f"{source!r} has no column 'text'; its first line is {first[:80]!r}. Name the column with the texts text "
            "in a first line of names; the other columns stand in the answers as they are."
        )
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"The first line of {source!r} names a column twice, or not at all: {first[:80]!r}.")
    for number, fields in enumerate(rows, start=1):
        if fields and len(fields) != len(header):
            raise DataError(
                f"Row {number} of {source!r} has {len(fields)} columns, its header {len(header)}: {str(fields)[:60]}. "
                "A text that holds the separator must be quoted."
            )
        if fields:
            row = dict(zip(header, fields, strict=True))
            yield _checked(row, f"Row {number} of {source!r}", str(row))


def _comma_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    """Split lines as RFC 4180 does: a quoted field may hold commas, doubled quotes and line breaks."""
    try:
        yield from csv.reader(lines, strict=True)
    except csv.Error as error:
        raise DataError(
            f"The file is no CSV ({error}). Put fields that hold commas, quotes or line breaks in double quotes, and "
            'write " inside them as "".'
        ) from error


def _tab_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    """Split lines at tabs; pandas writes a field that holds quotes in quotes, with its own quotes doubled."""
    for line in map(_without_end, lines):
        yield [_unquoted(field) for field in line.split("\t")] if line else []


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '""' in field[1:-1] and '"' not in inner
    return field[1:-1].replace('""', '"') if quoted else field


_TABLES: dict[str, Callable[[Iterator[str]], Iterator[list[str]]]] = {".csv": _comma_rows, ".tsv": _tab_rows}


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"File {str(path)!r} cannot be read: {error.strerror}. Check its permissions.") from error


def _lines(stream: Any, name: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield decode(line, f"Line {number} of {name}", error=DataError)  # says which encoding it may be


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
