"""Rows with the same columns whatever the source, built from records: one function a kind."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets

from sparse_ft.backbone.words import split_words
from sparse_ft.errors import DataError
from sparse_ft.tasks.columns import Reading, label_name, source_label, source_value, texts_of
from sparse_ft.tasks.label_lists import multi_hot_names, source_labels
from sparse_ft.tasks.records import Record, pick
from sparse_ft.tasks.spec import Column, TaskSpec
from sparse_ft.tasks.tagged_rows import check_spans, tagged_row
from sparse_ft.tasks.values import exact_text, list_cell

_LOG = logging.getLogger("sparse_ft")

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


def to_dataset(records: Sequence[Record], reading: Reading) -> datasets.Dataset:
    """Build the Dataset of one split.

    Args:
        records: The records of the source.
        reading: The meaning of their columns.

    Returns:
        One row a record with our columns and ``row``; records that the kind or ``drop_labels`` leaves out are missing.

    Raises:
        DataError: If a record does not fit; with file and line.
    """
    reading = reading._replace(columns=_with_question(reading.spec, reading.columns, records[0]))
    if reading.spec.kind == "multi_label":
        reading = reading._replace(multi_hot=multi_hot_names(records, reading))
    rows = [{**row, "row": record.row} for record in records if (row := _row(record, reading)) is not None]
    if not rows:
        raise DataError(
            f"No row of {records[0].path!r} is left: all have no words, or a label in {reading.spec.drop_labels}. "
            "Check the file and `drop_labels` in the task file."
        )
    _warn_of_losses(rows, records[0].path)
    check_spans(rows, records[0].path, train=reading.strict)
    features = datasets.Features({name: _FEATURES[name] for name in rows[0] if name in _FEATURES})
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _with_question(spec: TaskSpec, columns: dict[str, Column], record: Record) -> dict[str, Column]:
    """Add the question of a multiple choice, which is optional, where a record has it under our own name."""
    there = isinstance(record.values, dict) and "text_pair" in record.values
    wanted = spec.kind == "multiple_choice" and "text_pair" not in columns
    return {**columns, "text_pair": "text_pair"} if there and wanted else columns


def _row(record: Record, reading: Reading) -> dict[str, Any] | None:
    try:
        row = _ROWS[reading.spec.kind](record, reading)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.location} holds half of a character ({error.object[error.start]!r}), as a cut emoji leaves it. "
            "Correct the row or leave it out."
        ) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"{record.location} is no row of a {reading.spec.kind}: {error}. Correct it, or `columns` in the task file."
        ) from error
    return row


def _warn_of_losses(rows: Sequence[dict[str, Any]], path: str) -> None:
    lost = sum("answers" in row and row["answers"] is not None and max(row["answer_starts"]) < 0 for row in rows)
    if lost:
        _LOG.warning(
            "%s: %d of %d questions have no answer that stands in the text. Training leaves them out; a score counts "
            "them.", path, lost, len(rows),
        )  # fmt: skip
    dropped = sum(row.get("overlapping", 0) for row in rows)
    if dropped:
        _LOG.warning("%s: %d spans overlap longer or earlier ones and are left out.", path, dropped)


def _classification_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    texts, value = texts_of(record, reading), source_label(record, reading, "label")
    if value is None:
        return {**texts, "label": None}
    label = source_value(value, "label", record, reading)
    return None if label in reading.spec.drop_labels else {**texts, "label": label_name(label, record, reading)}


def _multi_label_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    """Name the labels of a row; null means hidden labels."""
    texts, items = texts_of(record, reading), source_labels(record, reading)
    if items is None:
        return {**texts, "labels": None}
    labels = [source_value(item, "label", record, reading) for item in items]
    if not set(labels).isdisjoint(reading.spec.drop_labels):
        return None
    return {**texts, "labels": [label_name(label, record, reading) for label in labels]}


def _question_row(record: Record, reading: Reading) -> dict[str, Any]:
    """Locate the answers in the text; where the source gives a wrong start, the nearest occurrence counts."""
    texts = texts_of(record, reading)
    text = texts["text"]
    words = split_words(text, reading.spec.language)
    row = {
        **texts,
        "tokens": [word.text for word in words],
        "starts": [word.start for word in words],
        "ends": [word.end for word in words],
        "answers": None,
        "answer_starts": None,
    }
    value = source_label(record, reading, "answers")
    if value is None:
        return row
    answers = _source_answers(value, record)
    starts = [_nearest(text, answer, start) for answer, start in answers]
    if not reading.labelled and max(starts, default=-1) < 0:  # CMRC 2018 hides answers behind FAKE_ANSWER_1
        return row
    if not answers:
        raise DataError(f"{record.location}: the question has no answer. Add one, or leave the question out.")
    return {**row, "answers": [answer for answer, _ in answers], "answer_starts": starts}


def _source_answers(value: Any, record: Record) -> list[tuple[str, int]]:
    """Return the texts and starts of a list of answers, or of two parallel lists, as the hub has them."""
    if isinstance(value, dict) and {"text", "answer_start"} <= set(value):
        value = [
            {"text": text, "answer_start": start}
            for text, start in zip(value["text"], value["answer_start"], strict=True)
        ]
    if isinstance(value, list) and all(isinstance(item, dict) and "text" in item for item in value):
        return [
            (exact_text(item["text"], "an answer", record.location), _start(item.get("answer_start", -1), record))
            for item in value
        ]
    raise DataError(f'{record.location}: answers must be [{{"text", "answer_start"}}, …], not {str(value)[:60]!r}.')


def _start(value: Any, record: Record) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{record.location}: answer_start must be an index of a character, not {value!r}.")
    return value


def _nearest(text: str, answer: str, start: int) -> int:
    """Return the start of the occurrence of an answer that is nearest to ``start``; -1 if there is none."""
    if not answer.strip():
        return -1
    starts = [match.start() for match in re.finditer(f"(?={re.escape(answer)})", text)]
    return min(starts, key=lambda other: abs(other - start)) if starts else -1


def _choice_row(record: Record, reading: Reading) -> dict[str, Any]:
    """Read the choices and the right one, which the source gives by its 0-based index or its text."""
    texts = texts_of(record, reading)
    value = pick(record, reading.columns["choices"])
    choices = list_cell(value) if isinstance(value, str) else value
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{record.location}: choices must be a list of texts with one at least, not {value!r}.")
    choices = [exact_text(choice, "a choice", record.location) for choice in choices]
    value = source_label(record, reading, "answer")
    if isinstance(value, str) and value in choices:
        value = choices.index(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(choices)):
        raise DataError(
            f"{record.location}: the answer {value!r} is none of the choices, nor the index of one from 0 to "
            f"{len(choices) - 1}: {', '.join(choices)}."
        )
    return {**texts, "choices": choices, "answer": value}


_ROWS: dict[str, Callable[[Record, Reading], dict[str, Any] | None]] = {
    "classification": _classification_row,
    "multi_label": _multi_label_row,
    "token_classification": tagged_row,
    "span_extraction": _question_row,
    "multiple_choice": _choice_row,
}
