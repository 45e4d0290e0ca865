"""Divide rows without splits into train, validation and test."""

import itertools
import logging
import random
from collections.abc import Sequence

from sparse_ft.errors import DataError
from sparse_ft.tasks.records import Record, pick, plain_text
from sparse_ft.tasks.spec import SPLITS, Column, Split, TaskSpec

_LOG = logging.getLogger("sparse_ft")

SPLIT_SEED = 13
"""Fixed, so that every run holds out the same rows."""


def cut_validation(spec: TaskSpec, records: dict[Split, list[Record]], *, column: Column | None) -> None:
    """Move a fixed tenth of train to validation; ``column`` holds the text in the source."""
    if "train" not in records:
        return
    records["train"], records["validation"] = _divide(records["train"], tenths=(9, 1), column=column)
    held_out, left = len(records["validation"]), len(records["train"])
    _LOG.info(
        "Task %s has no validation split: %d of the %d rows of train are held out for it (seed %d).",
        spec.name, held_out, held_out + left, SPLIT_SEED,
    )  # fmt: skip


def divide_rows(records: Sequence[Record], *, column: Column | None) -> dict[Split, list[Record]]:
    """Divide rows 80/10/10 into train, validation and test; ``column`` holds the text in the source."""
    parts = dict(zip(SPLITS, _divide(records, tenths=(8, 1, 1), column=column), strict=True))
    _LOG.info(
        "%s has no splits: its %d rows are divided into %d for train, %d for validation and %d for test (seed %d).",
        records[0].path, len(records), *map(len, parts.values()), SPLIT_SEED,
    )  # fmt: skip
    return parts


def _divide(records: Sequence[Record], *, tenths: Sequence[int], column: Column | None) -> list[list[Record]]:
    """Divide records at random by a fixed seed; every part keeps the order of the source.

    Rows with the same text stay together, so that no part is scored on a text that another was trained on. The
    exception: if the rarest text has a fifth of all rows, it may be a class of its own, and rows are divided alone.

    Args:
        records: At least as many as there are parts.
        tenths: Share of each part; the first takes the remainder, the others about their share, one row at least.
        column: The column of the text in the source; a row without it is not compared with others.
    """
    groups = _groups_of_equal_text(records, column)
    if len(groups) < len(tenths):
        noun = "rows" if len(groups) == len(records) else "rows with different texts"
        raise DataError(
            f"{records[0].path!r} has {len(groups)} {noun}, too few to hold some out for validation and test. "
            f"Expected at least {len(tenths)}."
        )
    if len(min(groups, key=len)) * 5 >= len(records) > len(groups):
        _LOG.warning(
            "%s has only %d different texts in %d rows, so rows with the same text stand in several of its parts.",
            records[0].path, len(groups), len(records),
        )  # fmt: skip
        groups = [[row] for row in range(len(records))]
    random.Random(SPLIT_SEED).shuffle(groups)
    parts: list[list[Record]] = []
    for share in reversed(tenths[1:]):
        chosen = set(itertools.chain(*_fill(groups, room=max(1, len(records) * share // 10))))
        groups = [group for group in groups if group[0] not in chosen]
        parts.append([records[row] for row in sorted(chosen)])
    return [[records[row] for row in sorted(itertools.chain(*groups))], *reversed(parts)]


def _groups_of_equal_text(records: Sequence[Record], column: Column | None) -> list[list[int]]:
    """Return the rows of each text, which is compared without case and white space."""
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        groups.setdefault(_text_of(record, column) or f"row {row}", []).append(row)
    return list(groups.values())


def _text_of(record: Record, column: Column | None) -> str | None:
    try:
        value = None if column is None else pick(record, column)
    except DataError:
        return None
    return "".join(plain_text(value).lower().split()) if value is not None else None


def _fill(groups: Sequence[list[int]], *, room: int) -> list[list[int]]:
    """Take groups in their order while they fit into ``room`` rows; the smallest group if none fits."""
    taken: list[list[int]] = []
    for group in groups:
        if len(group) <= room:
            taken.append(group)
            room -= len(group)
    return taken or [min(groups, key=len)]
