"""The data of each task of a call, and the split that a task is scored on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import datasets

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.paths import user_path
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import Split, TaskSpec


@overload
def name_sources(data: str | Path | Mapping[str, str] | None, tasks: Sequence[str]) -> dict[str, str]: ...


@overload
def name_sources(data: TaskData | Mapping[str, TaskData] | None, tasks: Sequence[str]) -> dict[str, TaskData]: ...


def name_sources(data: TaskData | Mapping[str, TaskData] | None, tasks: Sequence[str]) -> Mapping[str, TaskData]:
    """Assign the data of a call to its tasks.

    Args:
        data: The data of the only task; or task name to data.
        tasks: Names of the tasks of this call.

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
    if len(tasks) != 1:
        shown = f"--data {str(data)!r}" if isinstance(data, str | Path) else f"data in memory ({type(data).__name__})"
        raise ConfigError(
            f"{shown} names no task, but there are {len(tasks)}: {', '.join(tasks)}. "
            "Write --data TASK=PATH, or data={TASK: ...} in Python."
        )
    return {tasks[0]: _absolute(data)}


def _absolute(source: TaskData) -> TaskData:
    """Make a path absolute, so that it holds in every working directory."""
    return str(user_path(source).absolute()) if isinstance(source, str | Path) else source


def scored_splits(specs: Mapping[str, TaskSpec], sources: Mapping[str, TaskData]) -> dict[str, Split]:
    """Return the ``scored_split`` of each task; all data is read, so that errors in it show here."""
    return {name: scored_split(spec, sources.get(name)) for name, spec in specs.items()}


def scored_split(spec: TaskSpec, source: TaskData | None) -> Split:
    """Return ``test``, or ``validation`` for a task without a test split or with hidden answers in it."""
    test = read(spec, data=source, splits=["test"]).get("test")
    if test is None:
        return "validation"
    answers = test[find_kind(spec.kind).answer_column]
    return "test" if any(answer is not None for answer in answers) else "validation"
