"""Rows of tagging tasks: words with IOB2 tags, from tags in any scheme or from character spans."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from sparse_ft.backbone.words import LINE_BREAK, Word, cut_words, split_words
from sparse_ft.errors import DataError
from sparse_ft.tasks.columns import Reading, check_declared, list_of, source_label, source_value, texts_of
from sparse_ft.tasks.records import SENTENCE, Record, pick, split_tokens
from sparse_ft.tasks.schemes import (
    SCHEMES,
    Span,
    first_invalid,
    schemes_of,
    split_tag,
    tags_from_spans,
    to_iob2,
)
from sparse_ft.tasks.values import exact_text, list_cell

_LOG = logging.getLogger("sparse_ft")

_ENOUGH = 10
"""Number of spans from which on their offsets are doubted together."""


def tagged_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    """Return ``tokens`` and ``tags``; with spans also ``text``, ``starts``, ``ends`` and ``parents``.

    Returns:
        None for a record without words.
    """
    if "spans" in reading.columns:
        return _span_row(record, reading)
    value = pick(record, reading.columns["tokens"])
    tokens = [exact_text(token, "a token", record.location) for token in _parts(value, "tokens", record)]
    if not "".join(tokens):
        return None
    tags = source_label(record, reading, "tags")
    if tags is None:
        return {"tokens": tokens, "tags": None}
    tags = _parts(tags, "tags", record)
    if len(tags) != len(tokens):
        raise DataError(f"{record.location}: {len(tokens)} tokens but {len(tags)} tags. Give one tag a token.")
    return {"tokens": tokens, "tags": _tags(tags, record, reading)}


def _parts(value: Any, column: str, record: Record) -> list[Any]:
    """Return the tokens or tags of a row, which a table holds as one string."""
    return split_tokens(value) if isinstance(value, str) and not list_cell(value) else list_of(value, column, record)


def _tags(source: Sequence[Any], record: Record, reading: Reading) -> list[str]:
    """Name, check and convert the tags of one sentence to IOB2; ``labels`` of the task then map the entity types."""
    texts = [source_value(tag, "a tag", record, reading) for tag in source]
    tags = [reading.labels.get(text, text) for text in texts]
    invalid = first_invalid(tags, reading.label_scheme)
    if invalid is not None:
        location = f"{record.location}, word {invalid + 1}"
        if record.noun == SENTENCE:
            location = record._replace(number=record.number + invalid, noun="line").location
        if tags[invalid].isdigit():
            raise DataError(
                f"{location}: the tag is the number {tags[invalid]}, which has no name. Name the numbers in the task "
                "file, e.g. `labels: {0: O, 1: B-PER, 2: I-PER}`."
            )
        fitting = schemes_of(tags) or schemes_of([tags[invalid]])
        advice = f"It is valid in {', '.join(fitting)}: set" if fitting else "Correct it, or"
        raise DataError(
            f"{location}: tag {tags[invalid]!r} is not valid in label scheme {reading.label_scheme!r}. {advice} "
            f"`label_scheme` in the task file ({', '.join(SCHEMES)})."
        )
    return [_typed(tag, record, reading) for tag in to_iob2(tags, reading.label_scheme)]


def _typed(tag: str, record: Record, reading: Reading) -> str:
    """Map the entity type of an IOB2 tag to its name."""
    prefix, source_type = split_tag(tag)
    if not source_type:
        return tag
    mapping = reading.spec.labels if isinstance(reading.spec.labels, dict) else {}
    entity_type = mapping.get(source_type, source_type)
    check_declared(entity_type, record, reading)
    return f"{prefix}-{entity_type}"


def _span_row(record: Record, reading: Reading) -> dict[str, Any] | None:
    """Split a text into words whose edges include those of all its spans, so that no entity is lost.

    These edges must be hidden from a model that is scored. So in evaluation splits ``parents`` gives, for each piece,
    the index of its word in the plain text as ``predict`` would split it.
    """
    text = texts_of(record, reading)["text"]
    spans = _source_spans(record, reading, text)
    apart = _without_overlaps(spans or [])
    edges = {edge for span in apart for edge in (span.start, span.end)}
    plain = split_words(text, reading.spec.language)
    words = cut_words(plain, edges)
    if not words:
        return None
    starts = [word.start for word in plain]
    parents = {} if reading.strict else {"parents": [bisect_right(starts, word.start) - 1 for word in words]}
    tags = None
    if spans is not None:
        in_words = [_over_words(span, words, record) for span in apart]
        tags = [_typed(tag, record, reading) for tag in tags_from_spans(in_words, len(words))]
    return {
        "tokens": [word.text for word in words],
        "tags": tags,
        "text": text,
        "starts": [word.start for word in words],
        "ends": [word.end for word in words],
        **parents,
        "overlapping": len(spans or []) - len(apart),
        **_misfits(apart, plain, text),
    }


def _misfits(spans: Sequence[Span], words: Sequence[Word], text: str) -> dict[str, int]:
    """Count the spans, and those that whole words in one line cannot form."""
    first = [_word_around(span.start, words) for span in spans]
    last = [_word_around(span.end, words) for span in spans]
    return {
        "spans": len(spans),
        "within": sum(word is not None or other is not None for word, other in zip(first, last, strict=True)),
        "late": sum(word is not None and word.start == span.start - 1 for word, span in zip(first, spans, strict=True)),
        "short": sum(word is not None and word.end == span.end + 1 for word, span in zip(last, spans, strict=True)),
        "broken": sum(LINE_BREAK.search(text[span.start : span.end].strip()) is not None for span in spans),
    }


def _word_around(edge: int, words: Sequence[Word]) -> Word | None:
    """Return the word that has the edge of a span inside."""
    index = bisect_left(words, edge, key=_start_of) - 1
    return words[index] if index >= 0 and edge < words[index].end else None


def _start_of(word: Word) -> int:
    return word.start


def check_spans(rows: Sequence[dict[str, Any]], path: str, *, train: bool) -> None:
    """Refuse spans whose offsets seem to be counted in another way; warn of those that no answer can equal.

    Args:
        rows: Rows of ``tagged_row``.
        path: The file, for messages.
        train: Whether the rows are for training; only then is a warning given.

    Raises:
        DataError: If half of ten spans or more end one character before the end of a word, or begin one after its
            start.
    """
    spans, within, late, short, broken = (
        sum(row.get(key, 0) for row in rows) for key in ("spans", "within", "late", "short", "broken")
    )
    doubts = {"end within a word; are the ends inclusive?": short, "begin within a word; do they count from 1?": late}
    for doubt, number in doubts.items():
        if spans >= _ENOUGH and 2 * number >= spans:
            raise DataError(
                f"{path!r}: {number} of {spans} spans {doubt} Offsets count characters from 0, end exclusive: correct "
                "them in the file."
            )
    if train and within:
        _LOG.warning(
            "%s: %d of %d spans begin or end within a word. Answers are whole words and will differ from these. Check "
            "the offsets, and `language` in the task file.", path, within, spans,
        )  # fmt: skip
    if train and broken:
        _LOG.warning(
            "%s: %d of %d spans go over a line break. Answers end with their line and will differ from these.",
            path, broken, spans,
        )  # fmt: skip


def _source_spans(record: Record, reading: Reading, text: str) -> list[Span] | None:
    value = source_label(record, reading, "spans")
    if value is None:
        return None
    spans = []
    for span in list_of(value, "spans", record):
        if not isinstance(span, dict) or not {"start", "end", "type"} <= set(span):
            raise DataError(f"{record.location}: a span must be {{start, end, type}} with end exclusive, not {span!r}.")
        offsets = {name: span[name] for name in ("start", "end")}
        if not all(isinstance(offset, int) and not isinstance(offset, bool) for offset in offsets.values()):
            raise DataError(f"{record.location}: start and end of a span must be whole numbers, not {offsets}.")
        if not 0 <= span["start"] < span["end"] <= len(text):
            raise DataError(
                f"{record.location}: span {span['start']} to {span['end']} is not within the {len(text)} characters of "
                "the text. Offsets count characters from 0, end exclusive."
            )
        entity_type = source_value(span["type"], "the type of a span", record, reading)
        spans.append(Span(entity_type, span["start"], span["end"]))
    return spans


def _without_overlaps(spans: Sequence[Span]) -> list[Span]:
    """Drop overlapping spans: the longer span stays, or the earlier of two that are equally long."""
    apart: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start - span.end, span.start)):
        if all(span.end <= other.start or other.end <= span.start for other in apart):
            apart.append(span)
    return sorted(apart, key=lambda span: span.start)


def _over_words(span: Span, words: Sequence[Word], record: Record) -> Span:
    """Convert a span over characters to one over words."""
    inside = [index for index, word in enumerate(words) if span.start <= word.start and word.end <= span.end]
    if not inside:
        raise DataError(
            f"{record.location}: the span {span.start} to {span.end} holds white space only. Correct its offsets."
        )
    return Span(span.type, inside[0], inside[-1] + 1)
