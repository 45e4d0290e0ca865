"""Data that a caller holds in memory, as records: Datasets, DataFrames, or lists of texts and labels."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas

from sparse_ft.errors import DataError
from sparse_ft.tasks.columns import wanted_columns
from sparse_ft.tasks.records import Record
from sparse_ft.tasks.spec import SPLITS, Split, TaskSpec
from sparse_ft.tasks.table_formats import named_records

InMemory: TypeAlias = datasets.Dataset | datasets.DatasetDict | pandas.DataFrame | tuple[Sequence[Any], Sequence[Any]]
"""A DatasetDict with the splits train, validation and test; or rows without splits, also as ``(texts, labels)``."""
TaskData: TypeAlias = str | Path | InMemory
"""The data of one task: the path of a file or folder, or a value in memory."""


def to_records(spec: TaskSpec, data: InMemory) -> list[Record] | dict[Split, list[Record]]:
    """Turn data in memory into records: of each split of a DatasetDict, otherwise of rows without splits.

    Args:
        spec: The task, whose ``columns`` name the columns of the data; a column may also have our name.
        data: The second part of a tuple holds labels, lists of labels (``multi_label``), or tags or spans
            (``token_classification``).

    Raises:
        DataError: If the data is of another type or has no rows, or splits or parts that the task does not read.
    """
    if isinstance(data, datasets.DatasetDict):
        return _of_splits(spec, data)
    if isinstance(data, datasets.Dataset):
        records = _dataset_records(data, "Dataset in memory")
    elif isinstance(data, pandas.DataFrame):
        records = list(_frame_records(data))
    elif isinstance(data, tuple):
        records = list(_pair_records(spec, data))
    else:
        raise DataError(
            f"The data of task {spec.name!r} is a {type(data).__name__}. Expected a path, a datasets.Dataset or "
            "DatasetDict, a pandas.DataFrame, or a tuple (texts, labels)."
        )
    if not records:
        raise DataError(f"The data of task {spec.name!r} in memory has no rows. Expected at least three.")
    return records


def _of_splits(spec: TaskSpec, data: datasets.DatasetDict) -> dict[Split, list[Record]]:
    for name in data:
        if name not in SPLITS:
            close = difflib.get_close_matches(name, SPLITS, n=1)
            raise DataError(
                f"The DatasetDict of task {spec.name!r} has a split {name!r}. Expected {', '.join(SPLITS)}; rename it"
                f"{f' to {close[0]!r}' if close else ''} or take it out."
            )
    records = {
        split: _dataset_records(data[split], f"DatasetDict in memory ({split})") for split in SPLITS if split in data
    }
    empty = [split for split, rows in records.items() if not rows]
    if empty or not records:
        raise DataError(f"The DatasetDict of task {spec.name!r} has no rows in {' and '.join(empty) or 'any split'}.")
    return records


def _dataset_records(dataset: datasets.Dataset, name: str) -> list[Record]:
    return list(named_records(dataset.with_format(None), name))


def _frame_records(frame: pandas.DataFrame) -> Iterator[Record]:
    names = [str(name) for name in frame.columns]
    for row, values in enumerate(frame.itertuples(index=False, name=None)):
        yield _record(dict(zip(names, values, strict=True)), "DataFrame in memory", row)


def _pair_records(spec: TaskSpec, data: tuple[Sequence[Any], Sequence[Any]]) -> Iterator[Record]:
    if len(data) != 2:
        raise DataError(f"The data of task {spec.name!r} is a tuple of {len(data)} parts. Expected (texts, labels).")
    texts, labels = map(_plain_list, data)
    wanted = list(wanted_columns(spec, spec.columns))
    if spec.kind == "token_classification":
        raw = "spans" in wanted and all(isinstance(text, str) for text in texts)
        wanted = ["text", "spans"] if raw or any(map(_has_spans, labels)) else ["tokens", "tags"]
    if len(wanted) != 2:
        raise DataError(
            f"The data of task {spec.name!r} is a tuple of texts and labels, but its rows have the columns "
            f"{', '.join(wanted)}. Expected a Dataset or a DataFrame with these columns."
        )
    if len(texts) != len(labels):
        raise DataError(
            f"The data of task {spec.name!r} has {len(texts)} texts and {len(labels)} labels. Expected as many labels "
            "as texts."
        )
    for row, values in enumerate(zip(texts, labels, strict=True)):
        yield _record(dict(zip(wanted, values, strict=True)), "texts and labels in memory", row)


def _plain_list(values: Any) -> list[Any]:
    """Return the items of a list, an array or a Series; a single text is none."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise DataError(f"Texts and labels in memory must be lists, not {type(values).__name__}: {str(values)[:60]!r}.")
    return list(values)


def _has_spans(label: Any) -> bool:
    return isinstance(label, list | tuple) and any(isinstance(item, Mapping) for item in label)


def _record(values: Mapping[str, Any], name: str, row: int) -> Record:
    return Record({column: _plain(value) for column, value in values.items()}, name, row + 1, "row", row)


def _plain(value: Any) -> Any:
    """Convert numpy's values to Python's, and missing values of pandas to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if value is pandas.NA or value is pandas.NaT or value != value else value  # NaN differs from itself
