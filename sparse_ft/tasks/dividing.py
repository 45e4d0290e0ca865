"""Divide the rows of one file into train, validation and test."""

import itertools
import logging
import random
from collections.abc import Sequence

from sparse_ft.errors import DataError
from sparse_ft.tasks.records import Record, pick, plain_text
from sparse_ft.tasks.spec import SPLITS, Column, Split, TaskSpec

logger = logging.getLogger("sparse_ft")

SPLIT_SEED = 13
"""Fixed, so that every run holds out the same rows."""


def cut_validation(spec: TaskSpec, records: dict[Split, list[Record]], *, column: Column | None) -> None:
    """Move a fixed tenth of train to validation; ``column`` is that of the text in the source."""
    if "train" not in records:
        return
    parts = _divide(records["train"], tenths=(9, 1), column=column)
    records["train"], records["validation"] = parts
    logger.info(
        "Task %s has no validation split: %d of the %d rows of train are held out for it (seed %d).",
        spec.name,
        len(parts[1]),
        len(parts[0]) + len(parts[1]),
        SPLIT_SEED,
    )


def divide_rows(records: Sequence[Record], *, column: Column | None) -> dict[Split, list[Record]]:
    """Divide rows without splits 80/10/10; ``column`` is that of the text in the source."""
    parts = dict(zip(SPLITS, _divide(records, tenths=(8, 1, 1), column=column), strict=True))
    logger.info(
        "%s has no splits: its %d rows are divided into %d for train, %d for validation and %d for test (seed %d).",
        records[0].path,
        len(records),
        *(len(part) for part in parts.values()),
        SPLIT_SEED,
    )
    return parts


def _divide(records: Sequence[Record], *, tenths: Sequence[int], column: Column | None = None) -> list[list[Record]]:
    """Divide records by chance but always alike; every part keeps the order of the source.

    Rows with the same text stay together, so that no part is asked what another was trained on, unless the rows of the
    rarest text are a fifth of all: they may be a whole class.

    Args:
        records: At least as many as there are parts.
        tenths: Share of each part; the first takes the remainder, the others about theirs, one row at least.
        column: Of the text in the source; where it is not found, every row is on its own.
    """
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault(_text_of(record, column) or f"row {place}", []).append(place)
    if len(groups) < len(tenths):
        what = "rows" if len(groups) == len(records) else "rows with different texts"
        raise DataError(
            f"{records[0].path!r} has {len(groups)} {what}, too few to hold some out for validation and test. "
            f"Expected at least {len(tenths)}."
        )
    order = list(groups.values())
    if len(min(order, key=len)) * 5 >= len(records) > len(groups):
        logger.warning(
            "%s has only %d different texts in %d rows, so rows with the same text stand in several of its parts.",
            records[0].path,
            len(groups),
            len(records),
        )
        order = [[place] for place in range(len(records))]
    random.Random(SPLIT_SEED).shuffle(order)
    parts: list[list[Record]] = []
    for share in reversed(tenths[1:]):
        room = max(1, len(records) * share // 10)
        taken: list[list[int]] = []
        for group in order:
            if len(group) <= room:
                taken.append(group)
                room -= len(group)
        chosen = {place for group in taken or [min(order, key=len)] for place in group}
        order = [group for group in order if group[0] not in chosen]
        parts.append([records[place] for place in sorted(chosen)])
    return [[records[place] for place in sorted(itertools.chain(*order))], *reversed(parts)]


def _text_of(record: Record, column: Column | None) -> str | None:
    """Return the text of a record, lower-cased and without white space; None if it has none."""
    try:
        value = None if column is None else pick(record, column)
    except DataError:
        return None
    return "".join(plain_text(value).lower().split()) if value is not None else None
