"""Records out of data files as they are published: CoNLL columns, CSV, TSV, JSON, CLUE, Parquet, line-parallel files.

Every reader yields one Record a row and knows nothing of tasks.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from sparse_ft.errors import DataError
from sparse_ft.tasks.records import QUESTION, SENTENCE, Record, locate, read_text, split_tokens, text_lines
from sparse_ft.tasks.spec import Column


class FileOptions(NamedTuple):
    """How a file is laid out, as far as its format leaves that open."""

    columns: dict[str, Column]
    """Our column to the source's; ``conll`` and ``lines`` read nothing else."""
    separator: str | None = None
    header: bool | None = True
    """None: the first row of a ``csv`` or ``tsv`` is a header if it holds the name of a wanted column."""
    key: str | None = None


def _read_conll(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield one record a sentence: a list of values for each wanted column."""
    wanted = {name: _position(name, column) for name, column in options.columns.items()}
    needed = max(len(set(wanted.values())), *(place + 1 if place >= 0 else -place for place in wanted.values()))
    sentence: dict[str, Any] = {name: [] for name in wanted}
    start = 0
    for number, line in text_lines(path):
        fields = split_tokens(line, options.separator)
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
        for name, place in wanted.items():
            sentence[name].append(fields[place])
    if start:
        yield Record(sentence, str(path), start, SENTENCE)


def _position(name: str, column: Column) -> int:
    if not isinstance(column, int):
        raise DataError(f"Column {name!r} of a conll file must be a position such as 0 or -1, not {column!r}.")
    return column


def _read_csv(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the rows of a CSV file quoted as RFC 4180 says: fields may hold commas, doubled quotes and line breaks."""
    yield from _table(path, _csv_rows(path), options)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default, which a long text has
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
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


def _read_tsv(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the rows of a TSV file; quotes mean nothing."""
    yield from _table(path, ((number, line.split("\t") if line else []) for number, line in text_lines(path)), options)


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
        raise DataError(f"The header of {str(path)!r} names column {twice[0]!r} twice. Give every column its own name.")
    return row


def _read_jsonl(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield one record a line."""
    for number, line in text_lines(path):
        if line.strip():
            yield Record(
                _checked_row(_parse_json(line, f"{str(path)!r}, line {number}"), path, number), str(path), number
            )


def _read_json(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the items of a JSON list, or of the list under one key of an object."""
    content = _parse_json(read_text(path), repr(str(path)))
    if options.key is not None:
        if not isinstance(content, dict) or options.key not in content:
            keys = ", ".join(content) if isinstance(content, dict) else "none, it is a list"
            raise DataError(
                f"{str(path)!r} has no key {options.key!r}. Its keys: {keys}. Correct the part after # in the name."
            )
        content = content[options.key]
    if isinstance(content, dict) and any(isinstance(value, list) for value in content.values()):
        raise DataError(f"{str(path)!r} is an object with the keys {', '.join(content)}. Choose one: {path.name}#KEY.")
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, start=1):
        yield Record(_checked_row(row, path, number), str(path), number, "record")


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        within = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(
            f"{place}: broken JSON at {within}: {error.msg}. Expected one object a line (jsonl) or one list (json)."
        ) from error


def _checked_row(row: Any, path: Path, number: int) -> dict[str, Any] | list[Any]:
    if not isinstance(row, dict | list):
        raise DataError(f"{str(path)!r}, row {number}: expected a JSON object or list, found {row!r}.")
    return row


def _read_squad(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``context``, ``question``, ``answers`` and ``id`` of each question, as SQuAD, CMRC 2018 and DRCD ship them.

    Answers are ``{"text", "answer_start"}``; their shape is that of
    https://github.com/ymcui/cmrc2018/tree/c0eb1b6ba219847457e6af3180da722bbeb656af/squad-style-data
    """
    content = _parse_json(read_text(path), repr(str(path)))
    number = 0
    for article in _member(content, "data", path, "an object"):
        for paragraph in _member(article, "paragraphs", path, f"the article after question {number}"):
            for question in _member(paragraph, "qas", path, f"the paragraph after question {number}"):
                number += 1
                values = {**question, "context": _member(paragraph, "context", path, f"the paragraph of {number}")}
                yield Record(values, str(path), number, QUESTION)


def _member(values: Any, name: str, path: Path, where: str) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise DataError(
            f"{str(path)!r}: {where} has no {name!r}. Expected the shape of SQuAD: data, paragraphs, context, qas, "
            "answers. Check that it is the right file."
        )
    return values[name]


def _read_parquet(path: Path, options: FileOptions) -> Iterator[Record]:
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
        dataset: Any; its ClassLabel features give the names.
        path: Where it comes from, for messages.
    """
    features = dataset.features
    for row, values in enumerate(dataset):
        named = {name: _class_name(features[name], value) for name, value in values.items()}
        yield Record(named, path, row + 1, "row", row)


def _class_name(feature: Any, value: Any) -> Any:
    if isinstance(feature, datasets.ClassLabel) and value is not None:
        return None if value == -1 else feature.int2str(value)
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.ClassLabel) and value is not None:
        return None if -1 in value else [inner.int2str(item) for item in value]
    return value


def _read_lines(folder: Path, options: FileOptions) -> Iterator[Record]:
    """Yield one record for each line number of files that run in parallel; columns are named by file."""
    names = dict.fromkeys(str(column) for column in options.columns.values())
    files = {name: [line for _, line in text_lines(locate(folder, name))] for name in names}
    counts = {name: len(lines) for name, lines in files.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"The files of {str(folder)!r} must have one line per row each, but their line counts differ: {found}."
        )
    for number, row in enumerate(zip(*files.values(), strict=True), start=1):
        yield Record(dict(zip(files, row, strict=True)), str(folder), number)
