"""The labels of multi-label rows: lists, strings with separators, cells of pandas, and zeros and ones."""

import re
from collections.abc import Sequence
from typing import Any

from sparse_ft.errors import DataError
from sparse_ft.tasks.columns import Reading, list_of, source_label
from sparse_ft.tasks.records import Record
from sparse_ft.tasks.values import label_text, list_cell

LABEL_SEPARATOR = "|"
"""Divides the labels of a row that the source writes as one string; label names may contain commas."""
_LIKE_A_LIST = re.compile(r"\[.*\]|[({]['\"].*[)}]|\(\)|\{\}|\w+\([\[{].*[\]}]\)|(frozen)?set\(\)", re.DOTALL)
"""Lists that are not written as Python's, tuples, sets, and arrays."""
_BITS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def source_labels(record: Record, reading: Reading) -> list[Any] | None:
    """Return the labels of a row as the source writes them; None if they are hidden.

    A string is a list as pandas writes it (``['a', 'b']``), or labels divided by LABEL_SEPARATOR. An empty string or
    list means no label at all.

    Raises:
        DataError: If the labels are no list without null.
    """
    items = _items(record, reading)
    if items is None or reading.multi_hot is None:
        return items
    return [name for name, item in zip(reading.multi_hot, items, strict=True) if _BITS[_bit(item)]]


def multi_hot_names(records: Sequence[Record], reading: Reading) -> list[str] | None:
    """Return the names that belong to the zeros and ones of a split; None if its labels are something else.

    Args:
        records: All records of the split.
        reading: The meaning of their columns.

    Raises:
        DataError: If the labels are zeros and ones, and the task does not list a name for each.
    """
    rows = [items for record in records if (items := _items(record, reading)) is not None]
    column, known = reading.columns["labels"], reading.spec.labels
    widths = {len(row) for row in rows}
    if len(widths) != 1 or widths == {0} or not all(_bit(item) in _BITS for row in rows for item in row):
        return None
    (width,) = widths
    names = known if isinstance(known, list) else [] if known else column if isinstance(column, list) else []
    if width == len(names) and {"0", "1"}.isdisjoint(map(str, names)):
        return [str(name) for name in names]
    if not isinstance(column, list) and all(len(set(map(_bit, row))) == len(row) for row in rows):
        return None  # ids of labels, each at most once
    raise DataError(
        f"{records[0].path!r}: the labels of every row are {width} zeros and ones, e.g. {rows[0]}. Write the names of "
        f"the labels instead, or list all {width} names in this order under `labels` in the task file."
    )


def _bit(item: Any) -> str:
    return label_text(item).lower()


def _items(record: Record, reading: Reading) -> list[Any] | None:
    column = reading.columns["labels"]
    if isinstance(column, list):  # one label or bit a column
        parts = [source_label(record, reading._replace(columns={"labels": part}), "labels") for part in column]
        return None if all(part is None for part in parts) else list_of(parts, "labels", record)
    value = source_label(record, reading, "labels", empty="")
    if value is None or not isinstance(value, str) or list_cell(value) is not None:
        return None if value is None else list_of(value, "labels", record)
    if _LIKE_A_LIST.fullmatch(value.strip()) and LABEL_SEPARATOR not in value:
        raise DataError(
            f"{record.location}: labels {value[:60]!r} look like a list, but are none. Write names in quotes, as in "
            f"['a', 'b'], or divide them by {LABEL_SEPARATOR}."
        )
    return [part.strip() for part in value.split(LABEL_SEPARATOR) if part.strip()]
