"""The data of each task of a call, and the rows of it that are scored."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import datasets

from sparse_ft.errors import ConfigError, DataError, unknown_name
from sparse_ft.paths import user_path
from sparse_ft.tasks.dividing import SPLIT_SEED
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import is_undivided, read, read_whole
from sparse_ft.tasks.spec import Division, Split, TaskSpec

_LOG = logging.getLogger("sparse_ft")

_FEW_ROWS = 10
"""Rows of a class below which a test is small; a task without classes counts as ten of them."""
_SHOWN_CLASSES = 12


@overload
def name_sources(
    data: str | Path | Mapping[str, str] | None, tasks: Sequence[str], *, specs: Sequence[TaskSpec] = ()
) -> dict[str, str]: ...


@overload
def name_sources(
    data: TaskData | Mapping[str, TaskData] | None, tasks: Sequence[str], *, specs: Sequence[TaskSpec] = ()
) -> dict[str, TaskData]: ...


def name_sources(
    data: TaskData | Mapping[str, TaskData] | None, tasks: Sequence[str], *, specs: Sequence[TaskSpec] = ()
) -> Mapping[str, TaskData]:
    """Assign the data of a call to its tasks.

    Args:
        data: The data of the only task; one file for several tasks, which read their answers from different columns
            of it; or task name to data.
        tasks: Names of the tasks of this call.
        specs: These tasks, if one file may serve them all.

    Returns:
        Task name to data; paths are absolute.

    Raises:
        ConfigError: If data without a task name is given for several tasks, or a name is not among the tasks.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping) and not isinstance(data, datasets.DatasetDict):
        for task in data:
            if task not in tasks:
                raise ConfigError(unknown_name("task in --data", task, tasks))
        return {task: _absolute(source) for task, source in data.items()}
    if len(tasks) != 1 and isinstance(data, str | Path) and user_path(data).is_file() and specs:
        _check_answer_columns(specs, data)
        return dict.fromkeys(tasks, _absolute(data))
    if len(tasks) != 1:
        shown = f"--data {str(data)!r}" if isinstance(data, str | Path) else f"data in memory ({type(data).__name__})"
        raise ConfigError(
            f"{shown} names no task, but there are {len(tasks)}: {', '.join(tasks)}. "
            "Write --data TASK=PATH, or data={TASK: ...} in Python."
        )
    return {tasks[0]: _absolute(data)}


def _check_answer_columns(specs: Sequence[TaskSpec], data: str | Path) -> None:
    """Refuse tasks that would read the same answers from one file."""
    read_by: dict[Any, str] = {}
    for spec in specs:
        answer = find_kind(spec.kind).answer_column
        answer = "spans" if answer == "tags" and "spans" in spec.columns else answer
        column = spec.columns.get(answer, answer)
        if str(column) in read_by:
            raise ConfigError(
                f"Tasks {read_by[str(column)]!r} and {spec.name!r} would both read their answers from the column "
                f"{column!r} of {str(data)!r}. Name the column of each in its task file (columns: {{{answer}: …}}), or "
                "write --data TASK=PATH for each."
            )
        read_by[str(column)] = spec.name


def _absolute(source: TaskData) -> TaskData:
    """Make a path absolute, so that it holds in every working directory."""
    return str(user_path(source).absolute()) if isinstance(source, str | Path) else source


def sources_in_memory(sources: Mapping[str, TaskData], tasks: Iterable[str]) -> dict[str, TaskData]:
    """Return the data of tasks that no config can name."""
    return {task: sources[task] for task in tasks if not isinstance(sources.get(task), str | None)}


class ScoredRows(NamedTuple):
    """Rows of a task to score, and their name in a report."""

    rows: datasets.Dataset
    name: str
    """The split; or the file that is scored whole."""
    held_out: bool = False
    """Whether these are the rows of one source that were held out of the training on it."""


def read_scored(
    spec: TaskSpec, split: Split, source: TaskData | None, *, trained_on: TaskData | None = None
) -> ScoredRows:
    """Read the rows that a task is scored on.

    One file, or rows in memory without splits, are scored whole. The exception: the task was trained on these very
    rows. Then only those that were held out for the split are.

    Args:
        spec: The task of a checkpoint, with its division.
        split: To score on, if the source has splits.
        source: The data.
        trained_on: The data that the checkpoint names; a file that has changed there, and the file of a checkpoint
            that knows no digest, are known by it.

    Raises:
        DataError: If the source has no such split.
    """
    undivided = source is not None and is_undivided(source)
    if source is not None and undivided:
        whole, digest = read_whole(spec, source)
        if not _trained(spec.division, digest, source, trained_on):
            return ScoredRows(whole, source_name(source))
        if split != "train" and _was_train_split(spec):
            raise DataError(
                f"{source_name(source)} holds the rows that task {spec.name!r} was trained on as its train split, so "
                "their scores would say nothing of new texts. Give other rows with --data FILE."
            )
    splits = read(spec, data=source, splits=[split])
    if split in splits:
        return ScoredRows(splits[split], split, held_out=undivided)
    if trains_on_all(spec):
        raise DataError(
            f"Task {spec.name!r} was trained on all its rows, so none is held out for {split}. Give other rows with "
            "--data FILE, or take --split train."
        )
    raise DataError(f"Task {spec.name!r} has no {split} split in its data. Choose another with --split.")


def _was_train_split(spec: TaskSpec) -> bool:
    """Tell whether the divided rows were a train split, of which only validation was held out."""
    division = spec.division
    return division is not None and bool(division.sha256) and division.rule != "all" and not division.test


def _trained(division: Division | None, digest: str, source: TaskData, trained_on: TaskData | None) -> bool:
    """Tell whether a task was trained on the rows of a source."""
    same_path = _is_same_path(source, trained_on)
    if division is not None and division.sha256:
        if same_path and division.sha256 != digest:
            _LOG.warning(
                "%s has changed since the training on it, so rows of the training may be among those scored. Score "
                "rows of another file.", source,
            )  # fmt: skip
        return same_path or division.sha256 == digest
    unknown = trained_on is None and not isinstance(source, str | Path)  # an old training in memory leaves no trace
    return same_path or (unknown and (division is None or division.rule != "own"))


def _is_same_path(source: TaskData, trained_on: TaskData | None) -> bool:
    """Tell whether two sources are one file; a file that has moved is known by its name."""
    if not isinstance(source, str | Path) or not isinstance(trained_on, str | Path):
        return False
    path, other = user_path(source), user_path(trained_on)
    return path.resolve() == other.resolve() or (path.name == other.name and not other.exists())


def source_name(source: TaskData | None) -> str:
    """Name data for a report or message."""
    return Path(source).name if isinstance(source, str | Path) else f"{type(source).__name__} in memory"


def scored_splits(specs: Mapping[str, TaskSpec], sources: Mapping[str, TaskData]) -> dict[str, Split]:
    """Return the ``scored_split`` of each task that has rows to score.

    All data is read, so that errors in it show here.
    """
    splits = {name: scored_split(spec, sources.get(name)) for name, spec in specs.items()}
    return {name: split for name, split in splits.items() if not trains_on_all(specs[name])}


def trains_on_all(spec: TaskSpec) -> bool:
    """Tell whether a task was trained on all its rows, so that none is left to score."""
    return spec.division is not None and spec.division.rule == "all"


def scored_split(spec: TaskSpec, source: TaskData | None) -> Split:
    """Return ``test``, or ``validation`` for a task without a test split or with hidden answers in it."""
    test = read(spec, data=source, splits=["test"]).get("test")
    if test is None:
        return "validation"
    answers = test[find_kind(spec.kind).answer_column]
    return "test" if any(answer is not None for answer in answers) else "validation"


def say_division(spec: TaskSpec, source: TaskData | None) -> None:
    """Say once how the rows of a task in training were divided, and warn of a test that is small."""
    division = spec.division
    if division is None or division.rule == "own" or division.fold is not None:
        return
    number = division.train + division.validation + division.test
    if division.rule == "all":
        _LOG.info("Task %s: all %d rows are trained on, so none is left to score.", spec.name, number)
        return
    if not division.test:
        _LOG.info(
            "Task %s has no validation split: %d of the %d rows of train are held out for it (%s, seed %d).",
            spec.name, division.validation, number, division.rule, SPLIT_SEED,
        )  # fmt: skip
        return
    _LOG.info(
        "%s has no splits: its %d rows are divided into %d for train, %d for validation and %d for test (%s, seed %d).",
        source_name(source), number, division.train, division.validation, division.test, division.rule, SPLIT_SEED,
    )  # fmt: skip
    if division.test < _FEW_ROWS * len(spec.label_names or range(10)):
        rows = read(spec, data=source, splits=["test"])["test"].to_dict()
        _LOG.warning(
            "Task %s: test has %d %s%s, so its scores say little. `--folds 5` tests every row once.",
            spec.name, division.test, "row" if division.test == 1 else "rows", _rows_by_class(spec, rows),
        )  # fmt: skip


def _rows_by_class(spec: TaskSpec, rows: Mapping[str, Sequence[Any]]) -> str:
    """Show the number of rows of each class, rarest first; nothing for tasks whose rows have no classes."""
    if "label" in rows:
        number = Counter(rows["label"])
    elif "labels" in rows:
        number = Counter(label for labels in rows["labels"] for label in labels or [])
    else:
        return ""
    shown = sorted((number[label], label) for label in spec.label_names or number)
    more = f", … {len(shown)} classes" if len(shown) > _SHOWN_CLASSES else ""
    return f" ({', '.join(f'{label} {count}' for count, label in shown[:_SHOWN_CLASSES])}{more})"
