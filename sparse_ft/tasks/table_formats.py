"""Read tables: CoNLL columns, CSV, TSV, Parquet and line-parallel files. Knows nothing of tasks."""

import csv
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from sparse_ft.errors import DataError
from sparse_ft.tasks.records import SENTENCE, FileOptions, Record, locate, read_text, split_tokens, text_lines
from sparse_ft.tasks.spec import Column

_TSV_FIELD = re.compile(r'(?:"(?P<quoted>(?:[^"]|"")*)"|[^"\t\r\n]*)(?:\t|\r?\n|$)')
_QUOTED_LINE = re.compile(r'"[^"\t]*"(?:\t"[^"\t]*")*\r?')
_TAG = re.compile(r"O|[A-Z]-.+")


def read_conll(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield one record a sentence: a list of values for each wanted column."""
    wanted = {name: _position(name, column) for name, column in options.columns.items()}
    needed = max(len(set(wanted.values())), *(index + 1 if index >= 0 else -index for index in wanted.values()))
    sentence: dict[str, Any] = {name: [] for name in wanted}
    start = 0
    for number, line in text_lines(path):
        fields = split_tokens(line, options.separator)
        if not start and _is_comment(line, fields, wanted):
            continue
        if not line.strip(" \t") or fields[0] == "-DOCSTART-":
            if start:
                yield Record(sentence, str(path), start, SENTENCE)
                sentence, start = {name: [] for name in wanted}, 0
            continue
        if len(fields) < needed:
            between = f"separator {options.separator!r}" if options.separator else "white space"
            raise DataError(
                f"Line {number} of {str(path)!r} has {len(fields)} columns, {needed} are needed: {line!r}. "
                f"Columns are divided by {between}; correct the line, or `separator` and `columns` in the task file."
            )
        start = start or number
        for name, index in wanted.items():
            sentence[name].append(fields[index])
    if start:
        yield Record(sentence, str(path), start, SENTENCE)


def _is_comment(line: str, fields: Sequence[str], wanted: Mapping[str, int]) -> bool:
    """Whether a line before a sentence is a comment, e.g. ``# id 1``, and not the word # with its tag."""
    if not line.startswith("# ") or "tags" not in wanted:
        return line.startswith("# ")
    index = wanted["tags"]
    return not -len(fields) <= index < len(fields) or not _TAG.fullmatch(fields[index])


def _position(name: str, column: Column) -> int:
    if not isinstance(column, int):
        raise DataError(f"Column {name!r} of a conll file must be a position such as 0 or -1, not {column!r}.")
    return column


def read_csv(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the rows of a CSV file quoted as in RFC 4180: fields may hold commas, doubled quotes and line breaks."""
    yield from _table(path, _csv_rows(path), options)


def _csv_rows(path: Path, *, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is less than a long text has
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    number = 1
    try:
        for row in reader:
            yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{str(path)!r}, line {number}: not valid CSV ({error}). "
            'Put fields that hold commas, quotes or line breaks in double quotes, and write " inside them as "".'
        ) from error


def read_tsv(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the rows of a TSV file. Quotes mean nothing, unless the whole file is quoted as pandas and R write it."""
    if _is_quoted(read_text(path)):
        yield from _table(path, _csv_rows(path, delimiter="\t"), options)
    else:
        lines = ((number, line.split("\t") if line else []) for number, line in text_lines(path))
        yield from _table(path, lines, options)


def _is_quoted(text: str) -> bool:
    """Whether every field with a quote is quoted, and one with good reason, or all of the first line.

    Good reasons are a doubled quote, a tab and a line break.
    """
    if '"' not in text:
        return False
    end, needed = 0, _QUOTED_LINE.fullmatch(text.partition("\n")[0]) is not None
    for field in _TSV_FIELD.finditer(text):
        if field.start() != end:
            return False
        end = field.end()
        needed = needed or re.search('""|[\t\n]', field["quoted"] or "") is not None
    return needed and end == len(text)


def _table(path: Path, rows: Iterator[tuple[int, list[str]]], options: FileOptions) -> Iterator[Record]:
    """Check that all rows are as wide as the first, and name their columns by the header if there is one."""
    header: list[str] | None = None
    width = 0
    for number, row in rows:
        if not row:
            continue
        if not width:
            width = len(row)
            if options.header or (options.header is None and _is_header(row, options.columns)):
                header = _checked_header(row, path)
                continue
        if len(row) != width:
            raise DataError(
                f"{str(path)!r}, line {number}: expected {width} columns as in the first line, found {len(row)}. "
                "Correct the line; a text that holds the separator must be quoted (csv) or cleaned (tsv)."
            )
        yield Record(dict(zip(header, row, strict=True)) if header else row, str(path), number)


def _is_header(row: list[str], columns: dict[str, Column]) -> bool:
    names = set(columns)
    for column in columns.values():
        names.update(str(part) for part in (column if isinstance(column, list) else [column]) if isinstance(part, str))
    return bool(names & set(row))


def _checked_header(row: list[str], path: Path) -> list[str]:
    twice = sorted({name for name in row if row.count(name) > 1})
    if twice:
        raise DataError(f"The header of {str(path)!r} names column {twice[0]!r} twice. Give each column another name.")
    return row


def read_parquet(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"Data file {str(path)!r} is not readable Parquet: {error}. Fetch or write it again."
        ) from error
    yield from named_records(datasets.Dataset(datasets.table.InMemoryTable(table)), str(path))


def named_records(dataset: datasets.Dataset, path: str) -> Iterator[Record]:
    """Yield the rows of a Dataset with class names in place of their integers; a class of -1 becomes None.

    Args:
        dataset: Any Dataset; its ClassLabel features name the classes.
        path: Origin of the Dataset, for messages.
    """
    features = dataset.features
    for row, values in enumerate(dataset):
        named = {name: _class_name(features[name], value) for name, value in values.items()}
        yield Record(named, path, row + 1, "row", row)


def _class_name(feature: Any, value: Any) -> Any:
    if isinstance(feature, datasets.ClassLabel) and value is not None:
        return None if value == -1 else feature.int2str(value)
    if isinstance(value, float) and value != value:  # as pandas writes a missing value
        return None
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.ClassLabel) and value is not None:
        return None if -1 in value else [inner.int2str(item) for item in value]
    return value


def read_lines(folder: Path, options: FileOptions) -> Iterator[Record]:
    """Yield one record for each line number of line-parallel files; columns are named by file."""
    names = dict.fromkeys(str(column) for column in options.columns.values())
    files = {name: [line for _, line in text_lines(locate(folder, name))] for name in names}
    counts = {name: len(lines) for name, lines in files.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"The files of {str(folder)!r} must have one line per row each, but their line counts differ: {shown}."
        )
    for number, row in enumerate(zip(*files.values(), strict=True), start=1):
        yield Record(dict(zip(files, row, strict=True)), str(folder), number)
