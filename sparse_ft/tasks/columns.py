"""The columns every task has, out of the records of any source: texts, label names, tokens and IOB2 tags."""

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets

from sparse_ft.backbone.words import cut_words, split_words
from sparse_ft.errors import ConfigError, DataError, unknown_name
from sparse_ft.tasks.records import SENTENCE, Record, label_text, pick, plain_text, split_tokens
from sparse_ft.tasks.schemes import Span, first_invalid, split_tag, tags_from_spans, to_iob2
from sparse_ft.tasks.spec import Column, TaskSpec

logger = logging.getLogger("sparse_ft")

LABEL_SEPARATOR = "|"
"""Divides the labels of a multi-label row whose source holds one string; label names may contain commas."""

_STRING = datasets.Value("string")
_STRINGS = datasets.List(_STRING)
_OFFSETS = datasets.List(datasets.Value("int64"))
_FEATURES = {
    "text": _STRING,
    "text_pair": _STRING,
    "label": _STRING,
    "labels": _STRINGS,
    "tokens": _STRINGS,
    "tags": _STRINGS,
    "starts": _OFFSETS,
    "ends": _OFFSETS,
    "parents": _OFFSETS,
    "choices": _STRINGS,
    "answer": datasets.Value("int64"),
    "answers": _STRINGS,
    "answer_starts": _OFFSETS,
    "row": datasets.Value("int64"),
}

_ANSWERS: dict[str, list[str]] = {
    "classification": ["label"],
    "multi_label": ["labels"],
    "span_extraction": ["answers"],
    "multiple_choice": ["choices", "answer"],
}
"""The columns that a kind needs besides texts; token classification has ``tokens`` and ``tags``, or ``spans``."""


class Reading(NamedTuple):
    """How the records of one split become rows."""

    spec: TaskSpec
    columns: dict[str, Column]
    """Our column to the source's."""
    labels: dict[str, str]
    """Source values to names; values that are not in it are names already."""
    label_scheme: str
    strict: bool = False
    """Train split: every row needs a label, and one that the task declares."""
    labelled: bool = True
    """False: the label column may be missing."""


def wanted_columns(spec: TaskSpec, columns: dict[str, Column]) -> dict[str, Column]:
    """Complete the columns of a source with those that bear our own names.

    Args:
        spec: The task, whose kind decides which columns are needed.
        columns: Our column to the source's, as far as the names differ.

    Raises:
        ConfigError: If the kind has no columns.
    """
    if spec.kind not in _ROWS:
        raise ConfigError(f"Task {spec.name!r}: {unknown_name('kind', spec.kind, _ROWS)}")
    if spec.kind == "token_classification":
        by_spans = "spans" in columns or (spec.files is not None and spec.files.format == "cluener")
        ours = ["text", "spans"] if by_spans else ["tokens", "tags"]
    else:
        pair = "text_pair" in columns or spec.kind == "span_extraction"
        ours = ["text", *(["text_pair"] if pair else []), *_ANSWERS[spec.kind]]
    return {name: columns.get(name, name) for name in ours}


def fitting_columns(columns: dict[str, Column], record: Record) -> dict[str, Column]:
    """Take our own names where a source does not have the task's, and spans or tokens as the source has them."""
    if not isinstance(record.values, dict):
        return columns
    there = record.values
    if "tokens" in columns and "tokens" not in there and "spans" in there:
        columns = {"text": "text", "spans": "spans"}
    if "spans" in columns and "spans" not in there and "tokens" in there:
        columns = {"tokens": "tokens", "tags": "tags"}
    fitting: dict[str, Column] = {}
    for name, column in columns.items():
        parts = column if isinstance(column, list) else [column]
        fitting[name] = name if name in there and not all(part in there for part in parts) else column
    return fitting


def text_column(columns: dict[str, Column]) -> Column | None:
    """Return the column of the source that holds the text, or its words."""
    return columns.get("text", columns.get("tokens"))


def to_dataset(records: Sequence[Record], reading: Reading) -> datasets.Dataset:
    """Build the Dataset of one split.

    Args:
        records: The rows of the source.
        reading: What their columns mean.

    Returns:
        One row a record, less those left out, with our columns and ``row``.

    Raises:
        DataError: If a record does not fit; with file and line.
    """
    make_row = _ROWS[reading.spec.kind]
    reading = reading._replace(columns=_with_question(reading.spec, reading.columns, records[0]))
    rows = []
    for record in records:
        try:
            row = make_row(record, reading)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{record.place} holds half of a character ({error.object[error.start]!r}), as a cut emoji leaves it. "
                "Mend the row or leave it out."
            ) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                f"{record.place} is no row of a {reading.spec.kind}: {error}. Correct it, or `columns` in the task "
                "file."
            ) from error
        if row is not None:
            rows.append({**row, "row": record.row})
    if not rows:
        raise DataError(
            f"No row of {records[0].path!r} is left: all have no words, or a label in {reading.spec.drop_labels}. "
            "Check the file and `drop_labels` in the task file."
        )
    lost = sum("answers" in row and row["answers"] is not None and max(row["answer_starts"]) < 0 for row in rows)
    if lost:
        logger.warning(
            "%s: %d of %d questions have no answer that stands in the text. Training leaves them out; a score counts "
            "them.", records[0].path, lost, len(rows),
        )  # fmt: skip
    dropped = sum(row.pop("overlapping", 0) for row in rows)
    if dropped:
        logger.warning("%s: %d spans overlap longer or earlier ones and are left out.", records[0].path, dropped)
    features = datasets.Features({name: _FEATURES[name] for name in rows[0]})
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _with_question(spec: TaskSpec, columns: dict[str, Column], record: Record) -> dict[str, Column]:
    """Add the question of a multiple choice, which may be left out, where a record has it under our own name."""
    there = isinstance(record.values, dict) and "text_pair" in record.values
    wanted = spec.kind == "multiple_choice" and "text_pair" not in columns
    return {**columns, "text_pair": "text_pair"} if there and wanted else columns


def _texts(record: Record, reading: Reading) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    for name in ("text", "text_pair"):
        if name in reading.columns:
            value = pick(record, reading.columns[name])
            if value is None:
                raise DataError(f"{record.place}: {name} is null. Give every row a text, or leave the row out.")
            texts[name] = plain_text(value)
    return texts


def _source_label(record: Record, reading: Reading, column: str, *, empty: str | None = None) -> Any:
    """Take the label as it stands; None if it is missing where it may be, ``empty`` for an empty string."""
    try:
        value = pick(record, reading.columns[column])
    except DataError:
        if reading.labelled:
            raise
        return None
    value = empty if value == "" else value
    if value is None:
        if reading.strict:
            raise DataError(f"{record.place}: a row of train has no {column}. Label it or leave it out.")
        return None
    return value


def _name(value: Any, record: Record, reading: Reading) -> str:
    """Map a source label to its name; in train it must be one that the task declares."""
    text = label_text(value)
    name = reading.labels.get(text, text)
    _check_known(name, record, reading)
    return name


def _check_known(name: str, record: Record, reading: Reading) -> None:
    known = reading.spec.label_names
    if reading.strict and known is not None and name not in known:
        raise DataError(
            f"{record.place}: {unknown_name('label', name, known)} Correct the row, or `labels` in the task file."
        )


def _classification_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    value = _source_label(record, reading, "label")
    if value is not None and label_text(value) in reading.spec.drop_labels:
        return None
    return {**_texts(record, reading), "label": None if value is None else _name(value, record, reading)}


def _multi_label_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    """Divide a string at LABEL_SEPARATOR; an empty string or list means no label at all, null a hidden one."""
    value = _source_label(record, reading, "labels", empty="")
    if isinstance(value, str):
        value = [part.strip() for part in value.split(LABEL_SEPARATOR) if part.strip()]
    items = None if value is None else _filled(value, "labels", record)
    if items and not {label_text(item) for item in items}.isdisjoint(reading.spec.drop_labels):
        return None
    names = None if items is None else [_name(item, record, reading) for item in items]
    return {**_texts(record, reading), "labels": names}


def _filled(value: Any, column: str, record: Record) -> list[Any]:
    """Return a list of values none of which is null."""
    if not isinstance(value, list) or None in value:
        raise DataError(f"{record.place}: {column} must be a list without null, not {str(value)[:60]!r}.")
    return value


def _token_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    if "spans" in reading.columns:
        return _span_row(record, reading)
    value = pick(record, reading.columns["tokens"])
    tokens = split_tokens(value) if isinstance(value, str) else list(map(str, _filled(value, "tokens", record)))
    if not "".join(tokens):
        return None
    tags = _source_label(record, reading, "tags")
    if tags is None:
        return {"tokens": tokens, "tags": None}
    tags = split_tokens(tags) if isinstance(tags, str) else _filled(tags, "tags", record)
    if len(tags) != len(tokens):
        raise DataError(f"{record.place}: {len(tokens)} tokens but {len(tags)} tags. Give one tag a token.")
    return {"tokens": tokens, "tags": _tags(tags, record, reading)}


def _tags(source: Sequence[Any], record: Record, reading: Reading) -> list[str]:
    """Name, check and convert the tags of one sentence to IOB2; ``labels`` of the task then map the entity types."""
    tags = [reading.labels.get(label_text(tag), label_text(tag)) for tag in source]
    invalid = first_invalid(tags, reading.label_scheme)
    if invalid is not None:
        place = f"{record.place}, word {invalid + 1}"
        if record.unit == SENTENCE:
            place = record._replace(number=record.number + invalid, unit="line").place
        raise DataError(
            f"{place}: tag {tags[invalid]!r} is not valid in label scheme {reading.label_scheme!r}. "
            "Correct it, or `label_scheme` in the task file (iob1, iob2, bioes, bmes)."
        )
    return [_typed(tag, record, reading) for tag in to_iob2(tags, reading.label_scheme)]


def _typed(tag: str, record: Record, reading: Reading) -> str:
    prefix, source_type = split_tag(tag)
    if not source_type:
        return tag
    mapping = reading.spec.labels if isinstance(reading.spec.labels, dict) else {}
    entity_type = mapping.get(source_type, source_type)
    _check_known(entity_type, record, reading)
    return f"{prefix}-{entity_type}"


def _span_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    """Split a text into words whose edges include those of all its spans, so that no entity is lost.

    Where a model is scored it must not see these edges: ``parents`` names the word of the plain text, as ``predict``
    would split it, that each of the pieces stands in.
    """
    text = _texts(record, reading)["text"]
    spans = _source_spans(record, reading, text)
    kept = _without_overlaps(spans or [])
    edges = {edge for span in kept for edge in (span.start, span.end)}
    plain = split_words(text, reading.spec.language)
    words = cut_words(plain, edges)
    if not words:
        return None
    starts = [word.start for word in plain]
    parents = {} if reading.strict else {"parents": [bisect_right(starts, word.start) - 1 for word in words]}
    tags = None
    if spans is not None:
        tags = [
            _typed(tag, record, reading)
            for tag in tags_from_spans([_over_words(span, words, record) for span in kept], len(words))
        ]
    return {
        "tokens": [word.text for word in words],
        "tags": tags,
        "text": text,
        "starts": [word.start for word in words],
        "ends": [word.end for word in words],
        **parents,
        "overlapping": len(spans or []) - len(kept),
    }


def _source_spans(record: Record, reading: Reading, text: str) -> list[Span] | None:
    value = _source_label(record, reading, "spans")
    if value is None:
        return None
    spans = []
    for span in _filled(value, "spans", record):
        if not isinstance(span, dict) or not {"start", "end", "type"} <= set(span):
            raise DataError(f"{record.place}: a span must be {{start, end, type}} with end exclusive, not {span!r}.")
        if not 0 <= span["start"] < span["end"] <= len(text):
            raise DataError(
                f"{record.place}: span {span['start']} to {span['end']} is not within the {len(text)} characters of "
                "the text. Offsets count characters from 0, end exclusive."
            )
        spans.append(Span(span["type"], span["start"], span["end"]))
    return spans


def _without_overlaps(spans: Sequence[Span]) -> list[Span]:
    """Of overlapping spans keep the longer one, of equally long ones the earlier."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start - span.end, span.start)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)


def _over_words(span: Span, words: Sequence[Any], record: Record) -> Span:
    inside = [place for place, word in enumerate(words) if span.start <= word.start and word.end <= span.end]
    if not inside:
        raise DataError(
            f"{record.place}: the span {span.start} to {span.end} holds white space only. Correct its offsets."
        )
    return Span(span.type, inside[0], inside[-1] + 1)


def _reading_row(record: Record, reading: Reading) -> dict[str, Any]:
    """Find the answers in the text; where the source says wrong where one starts, its nearest occurrence counts."""
    texts = _texts(record, reading)
    text = texts["text"]
    words = split_words(text, reading.spec.language)
    row = {
        **texts,
        "tokens": [word.text for word in words],
        "starts": [word.start for word in words],
        "ends": [word.end for word in words],
    }
    value = _source_label(record, reading, "answers")
    if value is None:
        return {**row, "answers": None, "answer_starts": None}
    answers = _source_answers(value, record)
    starts = [_nearest(text, answer, start) for answer, start in answers]
    hidden = not reading.labelled and max(starts, default=-1) < 0  # CMRC 2018 fills in FAKE_ANSWER_1
    if not answers and not hidden:
        raise DataError(f"{record.place}: the question has no answer. Give it one, or leave it out.")
    return {
        **row,
        "answers": None if hidden else [answer for answer, _ in answers],
        "answer_starts": None if hidden else starts,
    }


def _source_answers(value: Any, record: Record) -> list[tuple[str, int]]:
    """Return the texts and starts of a list of answers, or of lists side by side, as the hub has them."""
    if isinstance(value, dict) and {"text", "answer_start"} <= set(value):
        return [(str(text), int(start)) for text, start in zip(value["text"], value["answer_start"], strict=True)]
    if isinstance(value, list) and all(isinstance(item, dict) and "text" in item for item in value):
        return [(str(item["text"]), int(item.get("answer_start", -1))) for item in value]
    raise DataError(f'{record.place}: answers must be [{{"text", "answer_start"}}, …], not {str(value)[:60]!r}.')


def _nearest(text: str, answer: str, start: int) -> int:
    """Return where an answer stands in a text, nearest to where it is said to; -1 if nowhere."""
    if not answer.strip():
        return -1
    places = [found.start() for found in re.finditer(f"(?={re.escape(answer)})", text)]
    return min(places, key=lambda place: abs(place - start)) if places else -1


def _choice_row(record: Record, reading: Reading) -> dict[str, Any]:
    """Read the choices, and which is right: its place from 0, or its text."""
    texts = _texts(record, reading)
    choices = pick(record, reading.columns["choices"])
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{record.place}: choices must be a list of texts with one at least, not {choices!r}.")
    choices = [str(choice) for choice in choices]
    value = _source_label(record, reading, "answer")
    if value is None:
        return {**texts, "choices": choices, "answer": None}
    if isinstance(value, str) and value in choices:
        value = choices.index(value)
    if not isinstance(value, int) or not 0 <= value < len(choices):
        raise DataError(
            f"{record.place}: the answer {value!r} is none of the choices, nor the place of one from 0 to "
            f"{len(choices) - 1}: {', '.join(choices)}."
        )
    return {**texts, "choices": choices, "answer": value}


_ROWS: dict[str, Callable[[Record, Reading], dict[str, Any] | None]] = {
    "classification": _classification_row,
    "multi_label": _multi_label_row,
    "token_classification": _token_row,
    "span_extraction": _reading_row,
    "multiple_choice": _choice_row,
}
