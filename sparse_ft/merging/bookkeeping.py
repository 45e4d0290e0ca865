"""What must change in a checkpoint with its experts: names, tasks, scores, sources and the gate."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.checkpoint.manifest import check_name
from sparse_ft.errors import CheckpointError, ConfigError


def check_new_names(
    checkpoint: Checkpoint, *, experts: Sequence[str], tasks: Sequence[str] = (), advice: str = ""
) -> None:
    """Refuse names that are taken or may not be file names, before anything changes.

    Args:
        checkpoint: Holds the names that are taken.
        experts: New names of experts.
        tasks: New names of tasks.
        advice: Last sentence of the message.
    """
    known = (("expert", experts, checkpoint.model.experts.names), ("task", tasks, list(checkpoint.tasks)))
    for what, names, taken in known:
        for name in names:
            try:
                check_name(name)
            except CheckpointError as error:
                raise ConfigError(f"{error}{advice}") from error
            if name in taken:
                raise ConfigError(
                    f"There is {'an' if what == 'expert' else 'a'} {what} named {name!r} already: {', '.join(taken)}. "
                    f"Choose another name, or remove or rename that one.{advice}"
                )


def new_task_names(tasks: Sequence[str], *, expert: str, new: str) -> dict[str, str]:
    """Name the tasks of an expert that gets a new name.

    Returns:
        Task to new name: ``new`` for the only task and for the task named like the expert, ``new_task`` for others.
    """
    return {task: new if task == expert or len(tasks) == 1 else f"{new}_{task}" for task in tasks}


def tasks_using(checkpoint: Checkpoint, expert: str) -> list[str]:
    """Return the tasks whose answers depend on an expert."""
    gate = checkpoint.model.gate
    gated = gate is not None and expert in gate.names
    return [task for task, slot in checkpoint.model.tasks.items() if expert in slot.used or (slot.joint and gated)]


def listed_tasks(tasks: Iterable[str]) -> str:
    """Write names of tasks for a sentence: ``task 'a'``, or ``tasks 'a', 'b'``."""
    names = [repr(task) for task in tasks]
    return f"task{'s' if len(names) > 1 else ''} {', '.join(names)}"


def scores_without_gate(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the scores of a task, without that of the gate, which does not know the new expert."""
    return {name: copy.deepcopy(value) for name, value in scores.items() if name != "routing_accuracy"}


def set_sources(checkpoint: Checkpoint, sources: Mapping[str, str | None]) -> None:
    """Change where the data of tasks is, which `evaluate` looks up; None removes an entry."""
    changed = {**checkpoint.config.sources, **sources}
    existing = {task: source for task, source in changed.items() if source is not None}
    checkpoint.config = checkpoint.config.model_copy(update={"sources": existing})


def drop_gate(checkpoint: Checkpoint) -> list[str]:
    """Drop a gate that chose among other experts, and its scores, unless tasks need it; return sentences."""
    checkpoint.model.eval().requires_grad_(False)
    gated = [task for task, slot in checkpoint.model.tasks.items() if slot.gated]
    if gated:
        return [f"The gate is kept as it is, for {listed_tasks(gated)}; it does not know other experts than before."]
    for scores in checkpoint.metrics.values():
        scores.pop("routing_accuracy", None)
    if checkpoint.model.gate is None:
        return []
    checkpoint.model.gate = None
    return [
        "The gate is dropped, because it chose among other experts; `sparse-ft train --stage gate --from` fits one."
    ]
