"""Gather the experts of several checkpoints side by side in one model, before they are merged."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparse_ft.checkpoint.checkpoint import Checkpoint, load_bare
from sparse_ft.checkpoint.manifest import read_manifest
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.merging.add import NamedExperts, add_from, find_experts
from sparse_ft.merging.bookkeeping import new_task_names

ExpertPath = str | Path | tuple[str | None, str | Path]
"""A path that ``add_from`` reads, or (new name, path)."""


class Gathered(NamedTuple):
    """Experts of several checkpoints in one."""

    checkpoint: Checkpoint
    original_names: dict[str, str]
    """Task to its name in the checkpoint that it came from."""
    notes: list[str]
    """Sentences about what was added, left out or dropped."""


def gather(paths: Sequence[ExpertPath], *, number_names: bool, backbone: str | None) -> Gathered:
    """Put experts side by side on one backbone.

    Args:
        paths: As given to ``merge``.
        number_names: Whether names that collide get a number, because the experts will become one.
        backbone: Where the backbone is now, if not where the first checkpoint says.

    Raises:
        ConfigError: If names collide, or there are fewer than two experts.
        CheckpointError: If no path is a checkpoint, or one does not fit the first.
    """
    named = [path if isinstance(path, tuple) else (None, path) for path in paths]
    first = next((experts for _, path in named if (experts := find_experts(path)) is not None), None)
    if first is None:
        raise CheckpointError(
            f"None of {', '.join(repr(str(path)) for _, path in named)} is a checkpoint or CHECKPOINT/experts/NAME. "
            "Name at least one; it says on which backbone the experts were trained."
        )
    checkpoint = load_bare(first.checkpoint, backbone=backbone)
    numbered: dict[str, str] = {}
    notes = []
    for as_name, path in named:
        experts = find_experts(path)
        if number_names and as_name is None and experts is not None:
            notes.extend(_add_numbered(checkpoint, experts, numbered))
            continue
        changes = add_from(checkpoint, path, as_name=as_name)
        # An expert that will be merged does not stay as it was added; a LoRA of PEFT is described here only.
        notes.extend(changes[1:] if number_names and experts is not None else changes)
    if len(checkpoint.model.experts.names) < 2:
        raise ConfigError("There is only one expert to merge. Name another checkpoint, or one with several experts.")
    return Gathered(checkpoint, {task: numbered.get(task, task) for task in checkpoint.tasks}, notes)


def _add_numbered(checkpoint: Checkpoint, named: NamedExperts, numbered: dict[str, str]) -> list[str]:
    """Add experts one by one under names that are free, and note the tasks that were renamed in ``numbered``."""
    notes = []
    for expert in named.experts:
        tasks = read_manifest(named.checkpoint).tasks
        served = [task for task, entry in tasks.items() if entry.served_by == [expert]]
        name = _free_name(checkpoint, expert, served)
        notes.extend(add_from(checkpoint, named.checkpoint / "experts" / expert, as_name=name)[1:])
        if name != expert:
            numbered.update({new: old for old, new in new_task_names(served, expert=expert, new=name).items()})
    return notes


def _free_name(checkpoint: Checkpoint, expert: str, served: Sequence[str]) -> str:
    """Return the expert's name, with a number if it or a name that its tasks would get is taken."""
    name, number, tasks = expert, 1, list(served)
    while name in checkpoint.model.experts.names or not checkpoint.tasks.keys().isdisjoint(tasks):
        number += 1
        name = f"{expert}-{number}"
        tasks = list(new_task_names(served, expert=expert, new=name).values())
    return name
