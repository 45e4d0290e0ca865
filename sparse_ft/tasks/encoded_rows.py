"""Rows of a task with answers, encoded for a backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import datasets

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import Split, TaskSpec


@dataclass(frozen=True)
class EvalData:
    """Rows of one task with answers, encoded."""

    columns: dict[str, list[Any]]
    examples: list[Example]
    num_parts: list[int] | None
    """Words or choices of each row, for tasks that give logits for these."""
    whole: list[Example]
    """One a row, as a gate for texts is shown it."""

    @property
    def num_rows(self) -> int:
        """Number of texts."""
        return len(self.columns["row"])

    def take(self, rows: Sequence[int]) -> "EvalData":
        """Return some of the rows, which may not repeat, as data of their own."""
        if len(rows) == self.num_rows:
            return self
        places = {row: place for place, row in enumerate(rows)}
        return EvalData(
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
            [replace(example, row=places[example.row]) for example in self.examples if example.row in places],
            None if self.num_parts is None else [self.num_parts[row] for row in rows],
            [replace(self.whole[row], row=place) for place, row in enumerate(rows)],
        )


def prepare(columns: Mapping[str, Sequence[Any]], *, spec: TaskSpec, encoder: Encoder) -> EvalData:
    """Encode rows with answers; rows whose answer is hidden are left out.

    Args:
        columns: As ``readers.read`` gives them.
        spec: The task, its labels filled in.
        encoder: Of the backbone.
    """
    kind = find_kind(spec.kind)
    answers = kind.references(columns)
    known = [place for place, answer in enumerate(answers) if answer is not None]
    kept = {name: [values[place] for place in known] for name, values in columns.items()}
    examples = kind.encode(kept, encoder=encoder, labels=spec.label_names or [], language=spec.language)
    whole = whole_rows(examples, kept, spec=spec, encoder=encoder)
    return EvalData(kept, examples, kind.parts(kept, language=spec.language), whole)


def whole_rows(
    examples: Sequence[Example], columns: Mapping[str, Sequence[Any]], *, spec: TaskSpec, encoder: Encoder
) -> list[Example]:
    """Return one example a row, as ``predict`` shows it to a gate that knows no task yet.

    A long text is its beginning; of a text with a question or choices, the text and the question are seen.

    Args:
        examples: The rows as the task's kind reads them, one or several each.
        columns: The same rows.
        spec: The task.
        encoder: Of the backbone.
    """
    if spec.reads == "text":
        first = {example.row: example for example in reversed(examples)}
        (nothing,) = encoder.texts([""])  # of a row without words
        rows = range(len(next(iter(columns.values()))))
        return [first[row] if row in first else replace(nothing, row=row) for row in rows]
    if not find_kind(spec.kind).by_row:
        return list(examples)
    seconds = columns.get("text_pair") or [None] * len(columns["text"])
    return encoder.texts(list(columns["text"]), [second or "" for second in seconds])


def scored_splits(specs: Mapping[str, TaskSpec], sources: Mapping[str, TaskData]) -> dict[str, Split]:
    """Return the ``scored_split`` of each task; all data is read, so what is wrong with it shows here."""
    return {name: scored_split(spec, sources.get(name)) for name, spec in specs.items()}


def scored_split(spec: TaskSpec, source: TaskData | None) -> Split:
    """Return ``test``, or ``validation`` for a task without a test split or with hidden answers in it."""
    found = read(spec, data=source, splits=["test"])
    if "test" not in found:
        return "validation"
    answers = find_kind(spec.kind).references(found["test"].to_dict())
    return "test" if any(answer is not None for answer in answers) else "validation"


@overload
def name_sources(data: str | Path | Mapping[str, str] | None, tasks: Sequence[str]) -> dict[str, str]: ...


@overload
def name_sources(data: TaskData | Mapping[str, TaskData] | None, tasks: Sequence[str]) -> dict[str, TaskData]: ...


def name_sources(data: TaskData | Mapping[str, TaskData] | None, tasks: Sequence[str]) -> Mapping[str, TaskData]:
    """Say which data belongs to which task.

    Args:
        data: The data of the one task; or task name to data.
        tasks: Names of the tasks of this call.

    Returns:
        Task name to data; paths are absolute.

    Raises:
        ConfigError: If one value is given for several tasks, or a name is not among the tasks.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping) and not isinstance(data, datasets.DatasetDict):
        for task in data:
            if task not in tasks:
                raise ConfigError(unknown_name("task in --data", task, tasks))
        return {task: _from_anywhere(source) for task, source in data.items()}
    if len(tasks) != 1:
        shown = f"--data {str(data)!r}" if isinstance(data, str | Path) else f"data in memory ({type(data).__name__})"
        raise ConfigError(
            f"{shown} names no task, but there are {len(tasks)}: {', '.join(tasks)}. "
            "Write --data TASK=PATH, or in Python data={task: value}."
        )
    return {tasks[0]: _from_anywhere(data)}


def _from_anywhere(source: TaskData) -> TaskData:
    """Make a path absolute, so that it holds in every working directory."""
    return str(Path(source).expanduser().absolute()) if isinstance(source, str | Path) else source
