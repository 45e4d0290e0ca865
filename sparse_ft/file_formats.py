"""Records out of data files as they are published: CoNLL columns, CSV, TSV, JSON, CLUE, Parquet, line-parallel files.

Every reader yields one Record a row and knows nothing of tasks.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from sparse_ft.backbone.words import BLANK
from sparse_ft.errors import DataError
from sparse_ft.records import QUESTION, SENTENCE, Record, locate, pick, read_text, split_tokens, text_lines
from sparse_ft.tasks import Column


class FileOptions(NamedTuple):
    """How a file is laid out, as far as its format leaves that open."""

    columns: dict[str, Column]
    """Our column to the source's; ``conll`` and ``lines`` read nothing else."""
    separator: str | None = None
    header: bool | None = True
    """None: the first row of a ``csv`` or ``tsv`` is a header if it holds the name of a wanted column."""
    key: str | None = None


def read_file(folder: Path, name: str, *, format: str, options: FileOptions) -> list[Record]:
    """Read all records of one file, or of one folder of line-parallel files.

    Args:
        folder: Where the file lies.
        name: Its name, with or without ``.gz``; ``file.json#key`` takes one key of a JSON object.
        format: A key of FORMATS.
        options: Its layout.

    Returns:
        At least one record; ``row`` counts from 0.

    Raises:
        DataError: If the file is missing, empty or malformed; with file and line.
    """
    file_name, _, key = name.partition("#")
    path = folder / file_name if format == "lines" else locate(folder, file_name)
    read = FORMATS[format]
    records: list[Record] = []
    try:
        for row, record in enumerate(read(path, options._replace(key=key or None))):
            records.append(record._replace(row=row))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        where = f"{records[-1].place}: what follows" if records else f"{str(path)!r}: its beginning"
        raise DataError(f"{where} has not the shape of the format {format!r} ({error}). Correct the file.") from error
    if not records:
        raise DataError(f"Data file {str(path)!r} has no rows. Expected at least one; check that it is the right file.")
    return records


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


def _read_cluener(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``text`` and ``spans`` of CLUENER's lines, whose offsets are inclusive at both ends."""
    for record in _read_jsonl(path, options):
        if "spans" in record.values:
            yield record
            continue
        text, types = pick(record, "text"), record.values.get("label") if isinstance(record.values, dict) else None
        spans: list[dict[str, Any]] = []
        try:
            for entity_type, surfaces in (types or {}).items():
                for surface, places in surfaces.items():
                    for start, end in places:
                        _check_surface(record, text, start, surface)
                        spans.append({"start": start, "end": end + 1, "type": entity_type})
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f'{record.place}: the label is not {{"type": {{"words": [[first, last], …]}}, …}}: {error}.'
            ) from error
        yield record._replace(values={"text": text, "spans": None if types is None else spans})


def _read_cluewsc(path: Path, options: FileOptions) -> Iterator[Record]:
    for record in _read_jsonl(path, options):
        yield mark_pronoun(record)


def mark_pronoun(record: Record) -> Record:
    """Mark the candidate ``_so_`` and the pronoun ``[so]`` in the text of a CLUEWSC record.

    The marks are those of CLUE's own baseline:
    https://github.com/CLUEbenchmark/CLUE/blob/master/baselines/models_pytorch/classifier_pytorch/processors/clue.py

    Raises:
        DataError: If a span does not stand where its index says.
    """
    text, target = pick(record, "text"), pick(record, "target")
    marks = []
    try:
        for name, left, right in (("span1", "_", "_"), ("span2", "[", "]")):
            start, surface = target[f"{name}_index"], target[f"{name}_text"]
            _check_surface(record, text, start, surface)
            marks += [(start + len(surface), right), (start, left)]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{record.place}: the target needs span1_index, span1_text, span2_index and span2_text: {error!r}."
        ) from error
    for position, mark in sorted(marks, key=lambda entry: entry[0], reverse=True):
        text = text[:position] + mark + text[position:]
    return record._replace(values={**record.values, "text": text})  # type: ignore[dict-item]


def _check_surface(record: Record, text: str, start: int, surface: str) -> None:
    found = text[start : start + len(surface)]
    if found != surface:
        raise DataError(
            f"{record.place}: {surface!r} should stand at character {start}, but {found!r} does. Correct the offset."
        )


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


def _read_c3(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``context``, ``question``, ``choice`` and ``answer`` of each question of C3, its documents as lines.

    The file is a list of ``[[document, …], [{question, choice, answer}, …], id]``, as read by
    https://github.com/CLUEbenchmark/CLUE/blob/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/models_pytorch/mrc_pytorch/run_c3.py
    """
    content = _parse_json(read_text(path), repr(str(path)))
    number = 0
    for place, entry in enumerate(content if isinstance(content, list) else [content], start=1):
        parts = entry if isinstance(entry, list) else []
        if len(parts) < 2 or not all(isinstance(part, list) for part in parts[:2]):
            raise DataError(
                f"{str(path)!r}, entry {place}: expected [[document, …], [question, …], id] as C3 has it, found "
                f"{str(entry)[:60]!r}. Check that it is the right file."
            )
        for question in parts[1]:
            number += 1
            yield Record({**question, "context": "\n".join(map(str, parts[0]))}, str(path), number, QUESTION)


def _read_chid(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``text``, ``candidates``, ``answer`` and ``id`` of each blank of ChID's passages.

    A line is ``{"content": [passage, …], "candidates": [idiom, …]}``, with blanks written ``#idiom000378#``; the place
    of the right candidate stands under that name in the file ``<name>_answer.json`` beside it, as read by
    https://github.com/CLUEbenchmark/CLUE/blob/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/models_pytorch/mrc_pytorch/preprocess/CHID_preprocess.py
    In ``text`` the blank that is asked for is BLANK, and the others are dots.
    """
    answers = _chid_answers(path)
    number = 0
    for record in _read_jsonl(path, options):
        candidates = pick(record, "candidates")
        for passage in pick(record, "content"):
            for name in _IDIOM.findall(passage):
                number += 1
                text = _IDIOM.sub("……", passage.replace(name, BLANK))
                answer = None if answers is None else answers.get(name)
                if answers is not None and answer is None:
                    raise DataError(
                        f"{record.place}: the answers beside the file have none for {name}. Fetch both anew."
                    )
                values = {"text": text, "candidates": candidates, "answer": answer, "id": name}
                yield Record(values, str(path), number, "blank")


_IDIOM = re.compile(r"#idiom\d+#")


def _chid_answers(path: Path) -> dict[str, int] | None:
    """Read the answers that belong to a file of passages; None if its publisher hides them."""
    name = f"{path.name.removesuffix('.gz').removesuffix('.json')}_answer.json"
    beside = next((other for other in (path.with_name(name), path.with_name(f"{name}.gz")) if other.is_file()), None)
    return None if beside is None else dict(_parse_json(read_text(beside), repr(str(beside))))


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


FORMATS: dict[str, Callable[[Path, FileOptions], Iterator[Record]]] = {
    "conll": _read_conll,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "cluener": _read_cluener,
    "cluewsc": _read_cluewsc,
    "squad": _read_squad,
    "c3": _read_c3,
    "chid": _read_chid,
    "parquet": _read_parquet,
    "lines": _read_lines,
}
