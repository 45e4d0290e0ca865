"""Read the data of a task into Datasets that have the same columns whatever the source.

- classification: ``text``, ``label``
- multi_label: ``text``, ``labels``
- token_classification: ``tokens``, ``tags`` (IOB2). From character spans also ``text``, ``starts``, ``ends`` and,
  except in train, ``parents``: for each token, the index of the word of the plain text that contains it
- span_extraction: ``text``, ``text_pair`` (question), ``tokens``, ``starts``, ``ends``, ``answers``, ``answer_starts``
- multiple_choice: ``text``, ``choices``, ``answer`` (0-based index of the right choice)

Rows of a task that reads a second text also have ``text_pair``. ``row`` is the 0-based row of the source, in file order
and before any row is left out; if a split consists of several files, the count runs on. Labels are names. Labels and
answers are None where the publisher hides them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets

from sparse_ft.errors import DataError
from sparse_ft.paths import user_path
from sparse_ft.tasks.clue_formats import mark_pronoun
from sparse_ft.tasks.columns import Reading, fitting_columns, wanted_columns
from sparse_ft.tasks.dividing import OWN, cut_validation, divide_rows, rows_digest
from sparse_ft.tasks.formats import read_file, record_columns
from sparse_ft.tasks.hub import load_hub
from sparse_ft.tasks.in_memory import TaskData, to_records
from sparse_ft.tasks.records import FileOptions, Record
from sparse_ft.tasks.rows import to_dataset
from sparse_ft.tasks.schemes import split_tag
from sparse_ft.tasks.single_file import read_single
from sparse_ft.tasks.spec import (
    SPLITS,
    Division,
    FileSource,
    HubSource,
    Split,
    TaskSpec,
    check_has_data,
    list_tasks,
    load_task,
)


class Divided(NamedTuple):
    """Splits of a task, and how the rows without splits were divided into them."""

    splits: dict[Split, datasets.Dataset]
    division: Division


def read(
    spec: TaskSpec, *, data: TaskData | None = None, splits: Sequence[Split] = SPLITS
) -> dict[Split, datasets.Dataset]:
    """Read splits of a task.

    Args:
        spec: The task, whose ``division`` says how rows without splits are divided.
        data: A folder with the files that the task names; one file, which is divided 80/10/10 by a fixed seed; data in
            memory (see ``in_memory.to_records``); or None for the bundled files, else the hub.
        splits: Which splits to return.

    Returns:
        The splits that the source has. A missing validation split is a fixed tenth of train, taken out of train.

    Raises:
        DataError: If a file is missing or malformed, with its path and line; if the hub cannot be reached; or if there
            is no source at all.
    """
    return read_divided(spec, data=data, splits=splits).splits


def read_divided(
    spec: TaskSpec,
    *,
    data: TaskData | None = None,
    splits: Sequence[Split] = SPLITS,
    before: Division | None = None,
) -> Divided:
    """Read splits of a task, and say how its rows were divided.

    The arguments and errors are those of ``read``; ``before`` is that of ``dividing.divide_rows``.
    """
    if is_undivided(data):
        rows, reading = _read_rows(spec, data)
        records, division = divide_rows(spec, rows, columns=reading.columns, before=before)
        return Divided(_datasets(records, reading, splits), division)
    if isinstance(data, datasets.DatasetDict):
        return _read_in_memory(spec, data, splits, before)
    assert data is None or isinstance(data, str | Path)
    folder = _folder(spec, data)
    if folder is not None and spec.files is not None:
        return _read_folder(spec, spec.files, folder, splits, before)
    return _read_hub(spec, str(folder) if folder else None, splits, before)


def is_undivided(data: TaskData | None) -> bool:
    """Tell whether data is one file, or rows in memory without splits."""
    if isinstance(data, str | Path):
        return not user_path(data).is_dir()
    return data is not None and not isinstance(data, datasets.DatasetDict)


def read_whole(spec: TaskSpec, data: TaskData) -> tuple[datasets.Dataset, str]:
    """Read all rows of one file, or of rows in memory, as rows to score; return them and their ``rows_digest``."""
    rows, reading = _read_rows(spec, data)
    return to_dataset(rows, reading), rows_digest(spec, rows, columns=reading.columns)


def _read_rows(spec: TaskSpec, data: TaskData | None) -> tuple[list[Record], Reading]:
    """Read the records of a source without splits."""
    reading = _reading(spec)
    if isinstance(data, str | Path):
        rows, columns = read_single(spec, user_path(data))
        return rows, reading._replace(columns=columns)
    records = to_records(spec, data)
    assert isinstance(records, list)
    return records, reading._replace(columns=fitting_columns(reading.columns, records[0]))


def label_names(spec: TaskSpec, train: datasets.Dataset) -> list[str]:
    """List the labels that a head for this task decides between.

    Args:
        spec: The task.
        train: Its train split, as returned by ``read``.

    Returns:
        The labels that the task declares in their order, else those that occur in train, sorted; entity types (not
        tags) for token classification; none for kinds whose rows have answers of their own.

    Raises:
        DataError: If train holds fewer than two classes, or no entity.
    """
    if not spec.has_labels:
        return []
    occurring = sorted(_occurring_labels(spec, train))
    if spec.kind == "classification" and len(occurring) < 2:
        raise DataError(
            f"Train of task {spec.name!r} has one class only: {occurring}. A classifier needs rows of at least two; "
            "check the label column and the order of the file."
        )
    if not occurring:
        raise DataError(f"Train of task {spec.name!r} has no label at all. Check the column and the label_scheme.")
    return spec.label_names or occurring


def _occurring_labels(spec: TaskSpec, dataset: datasets.Dataset) -> set[str]:
    if spec.kind == "classification":
        return {label for label in dataset["label"] if label is not None}
    if spec.kind == "multi_label":
        return {label for labels in dataset["labels"] for label in labels or []}
    return {split_tag(tag)[1] for tags in dataset["tags"] for tag in tags or [] if tag != "O"}


def rows_seen_in_train(spec: TaskSpec, split: Split, *, data: TaskData | None = None) -> set[int]:
    """List the rows of an evaluation split whose text also occurs in train, according to the task file.

    Args:
        spec: The task.
        split: An evaluation split.
        data: As for ``read``. The task file describes the published files: nothing is known about a single file, data
            in memory, or the hub, whose order may differ.

    Returns:
        Values of the column ``row``.
    """
    if data is None:
        published = spec.files is not None and spec.files.root is not None
    else:
        published = isinstance(data, str | Path) and user_path(data).is_dir()
    return set(spec.leaks.get(split, [])) if published else set()


def _folder(spec: TaskSpec, data: str | Path | None) -> Path | None:
    """Return the folder to read from; None stands for the hub."""
    if data is not None:
        return user_path(data)
    root = Path(spec.files.root) if spec.files is not None and spec.files.root is not None else None
    if root is not None and (root.is_dir() or spec.hub is None):
        return root
    check_has_data(spec)
    if spec.foreign and spec.hub is not None and not _is_bundled(spec.hub):
        raise DataError(
            f"Task {spec.name!r} of the checkpoint names the data set {spec.hub.path!r} on the hub. Name its data with "
            "--data; or, if you trust whoever made the checkpoint, add --trust-tasks (in Python trust_tasks=True)."
        )
    return None


def _is_bundled(hub: HubSource) -> bool:
    """Whether a bundled task reads the same data set, so that a checkpoint did not choose it."""
    known = [spec.hub for spec in map(load_task, list_tasks()) if spec.hub is not None]
    return any((hub.path, hub.name, hub.revision) == (other.path, other.name, other.revision) for other in known)


def _reading(spec: TaskSpec) -> Reading:
    """Return the reading of a task's files; in tagging its labels may map entity types, which stand inside of tags."""
    mapped = spec.maps_tags or spec.kind != "token_classification"
    labels = spec.labels if isinstance(spec.labels, dict) and mapped else {}
    return Reading(spec, wanted_columns(spec, spec.columns), labels, spec.label_scheme)


def _datasets(
    records: dict[Split, list[Record]], reading: Reading, splits: Sequence[Split], *, unlabelled: Sequence[Split] = ()
) -> dict[Split, datasets.Dataset]:
    """Turn the records of the wanted splits into Datasets; only train must have known labels throughout."""
    return {
        split: to_dataset(records[split], reading._replace(strict=split == "train", labelled=split not in unlabelled))
        for split in SPLITS
        if split in splits and split in records
    }


def _read_folder(
    spec: TaskSpec, files: FileSource, root: Path, splits: Sequence[Split], before: Division | None
) -> Divided:
    reading = _reading(spec)
    named = {split: getattr(files, split) for split in SPLITS}
    records: dict[Split, list[Record]] = {}
    for split in _needed(splits, has_validation=named["validation"] is not None):
        columns = reading.columns
        if split in files.unlabelled and files.format in {"conll", "lines"}:
            columns = {name: column for name, column in columns.items() if name not in {"label", "labels", "tags"}}
        options = FileOptions(columns, separator=files.separator, header=files.header)
        rows: list[Record] = []
        for name in [named[split]] if isinstance(named[split], str) else named[split] or []:
            more = read_file(root, name, format=files.format, options=options)
            rows += [record._replace(row=record.row + len(rows)) for record in more]
        if rows:
            records[split] = rows
    reading = reading._replace(columns=record_columns(files.format, reading.columns))
    division = OWN
    if named["validation"] is None:
        division = cut_validation(spec, records, columns=reading.columns, before=before)
    return Divided(_datasets(records, reading, splits, unlabelled=files.unlabelled), division)


def _needed(splits: Sequence[Split], *, has_validation: bool) -> list[Split]:
    """Add train if validation must be cut from it."""
    cut = "validation" in splits and not has_validation
    return [split for split in SPLITS if split in splits or (split == "train" and cut)]


def _read_in_memory(
    spec: TaskSpec, data: datasets.DatasetDict, splits: Sequence[Split], before: Division | None
) -> Divided:
    reading, records, division = _reading(spec), to_records(spec, data), OWN
    assert isinstance(records, dict)
    reading = reading._replace(columns=fitting_columns(reading.columns, next(iter(records.values()))[0]))
    if "validation" not in records:
        division = cut_validation(spec, records, columns=reading.columns, before=before)
    return Divided(_datasets(records, reading, splits), division)


def _read_hub(spec: TaskSpec, folder: str | None, splits: Sequence[Split], before: Division | None) -> Divided:
    """Read from the hub, or from a local folder in hub layout."""
    hub = spec.hub or HubSource(path=str(folder))
    if folder is not None:
        hub = hub.model_copy(update={"path": folder, "name": None, "revision": None})
    loaded = load_hub(hub, wanted_columns(spec, spec.columns if hub.columns is None else hub.columns))
    theirs = {split: hub.splits.get(split, split) for split in SPLITS}
    has_validation = theirs["validation"] in loaded
    marked = spec.files is not None and spec.files.format == "cluewsc"
    records: dict[Split, list[Record]] = {}
    for split in _needed(splits, has_validation=has_validation):
        if theirs[split] in loaded:
            rows = loaded[theirs[split]]
            records[split] = [mark_pronoun(record) if marked else record for record in rows]
    if not records:
        raise DataError(
            f"Data set {hub.path!r} has the splits {', '.join(loaded)}, not {', '.join(splits)}. Set `hub.splits`."
        )
    reading = _reading(spec)._replace(label_scheme=hub.label_scheme or spec.label_scheme)
    if hub.columns is not None:
        reading = reading._replace(columns=wanted_columns(spec, hub.columns))
    if hub.labels is not None:
        reading = reading._replace(labels=hub.labels)
    division = OWN if has_validation else cut_validation(spec, records, columns=reading.columns, before=before)
    return Divided(_datasets(records, reading, splits), division)
