"""Edit a checkpoint: remove, rename, copy, add, prune and split experts; rename tasks and labels.

No other task changes. Each edit changes a checkpoint in place and returns sentences about what it did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.outputs import claimed_output
from sparse_ft.errors import ConfigError
from sparse_ft.experts.low_rank import prune as pruned_expert
from sparse_ft.merging.add import add_from
from sparse_ft.merging.bookkeeping import (
    check_new_names,
    drop_gate,
    listed_tasks,
    new_task_names,
    scores_without_gate,
    set_sources,
    tasks_using,
)
from sparse_ft.merging.renaming import rename_label as renamed_label
from sparse_ft.merging.renaming import rename_task as renamed_task
from sparse_ft.merging.split import split_expert


@dataclass(frozen=True)
class Edit:
    """The outcome of ``edit``."""

    path: Path
    changes: list[str]
    """One or more sentences for each change, in the order of the changes."""


def edit(
    checkpoint: str | Path,
    *,
    output: str | Path,
    remove: Sequence[str] | str = (),
    rename: Sequence[tuple[str, str]] = (),
    rename_task: Sequence[tuple[str, str]] = (),
    rename_label: Sequence[tuple[str, str, str]] = (),
    copy: Sequence[tuple[str, str]] = (),
    add: Sequence[tuple[str | None, str | Path]] = (),
    prune: Sequence[tuple[str, int]] = (),
    split: Sequence[tuple[str, str]] = (),
    backbone: str | None = None,
) -> Edit:
    """Change the experts of a checkpoint and write the outcome as a new one; the old one stays as it is.

    The changes are made in the order of the arguments, and each sees the names that those before it left.

    Args:
        checkpoint: Folder to read.
        output: Folder to write; must be empty or not exist.
        remove: Experts to remove, with the tasks that they serve.
        rename: (old, new) names of experts; their tasks keep their names.
        rename_task: (old, new) names of tasks; their experts keep their names.
        rename_label: (task, old, new) names of labels; data may keep the old ones.
        copy: (expert, name of the copy); see ``copy_expert``.
        add: (new name or None for the present one, path); see ``add_from``.
        prune: (expert, rank); see ``prune_expert``.
        split: (expert, name of the second half); see ``split_expert``.
        backbone: Where the backbone is now, if not where the checkpoint says.

    Raises:
        ConfigError: If there is nothing to do, a name is unknown or taken, or the output exists.
        CheckpointError: If a folder is no checkpoint or does not fit this one.
    """
    if not (remove or rename or rename_task or rename_label or copy or add or prune or split):
        raise ConfigError(
            "There is nothing to change. Give at least one --remove, --rename, --rename-task, --rename-label, --copy, "
            "--add, --prune or --split."
        )
    with claimed_output(output) as folder:
        loaded = load_checkpoint(checkpoint, backbone=backbone)
        changes = [
            *(remove_expert(loaded, name) for name in ([remove] if isinstance(remove, str) else remove)),
            *(rename_expert(loaded, old, new) for old, new in rename),
            *(renamed_task(loaded, old, new) for old, new in rename_task),
            *(renamed_label(loaded, task, old, new) for task, old, new in rename_label),
            *(copy_expert(loaded, old, new) for old, new in copy),
            *(add_from(loaded, path, as_name=as_name) for as_name, path in add),
            *(prune_expert(loaded, name, rank) for name, rank in prune),
            *(split_expert(loaded, name, new) for name, new in split),
        ]
        save_checkpoint(folder, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)
        return Edit(folder, [sentence for change in changes for sentence in change])


def remove_expert(checkpoint: Checkpoint, name: str) -> list[str]:
    """Remove an expert and the tasks that it serves, with their heads and scores.

    Raises:
        ConfigError: If there is no such expert, it is the last one, or another task is answered with it, too.
    """
    model = checkpoint.model
    model.experts.index(name)
    if len(model.experts.names) == 1:
        raise ConfigError(
            f"{name!r} is the last expert of {str(checkpoint.path)!r}; a checkpoint holds at least one. Keep it, or "
            "delete the folder."
        )
    served = [task for task, slot in model.tasks.items() if slot.experts == (name,)]
    left = [task for task in tasks_using(checkpoint, name) if task not in served]
    if left:
        raise ConfigError(
            f"Task {left[0]!r} also uses expert {name!r}; removing {name!r} would change its answers. Train the task "
            "anew without it."
        )
    for task in served:
        model.remove_task(task)
        del checkpoint.tasks[task]
        checkpoint.metrics.pop(task, None)
    set_sources(checkpoint, dict.fromkeys(served))
    model.experts.remove(name)
    with_tasks = f", and with it {listed_tasks(served)}" if served else "; it served no task"
    return [f"Removed expert {name!r}{with_tasks}.", *drop_gate(checkpoint)]


def rename_expert(checkpoint: Checkpoint, old: str, new: str) -> list[str]:
    """Give an expert another name; its tasks keep theirs, and a gate still chooses it.

    Raises:
        ConfigError: If there is no such expert, or the new name is taken or not allowed.
    """
    model = checkpoint.model
    model.experts.index(old)
    check_new_names(checkpoint, experts=[new])
    model.experts.rename(old, new)
    served = [task for task, slot in model.tasks.items() if old in slot.used]
    for task, slot in model.tasks.items():
        experts = tuple(new if name == old else name for name in slot.experts)
        model.tasks[task] = replace(slot, experts=experts, shared=new if slot.shared == old else slot.shared)
    if model.gate is not None:
        model.gate.names = [new if name == old else name for name in model.gate.names]
    if model.sequence_gate is not None and model.sequence_gate.trunk_expert == old:
        model.sequence_gate.trunk_expert = new
    return [f"Renamed expert {old!r} to {new!r}" + (f"; it serves {listed_tasks(served)}." if served else ".")]


def copy_expert(checkpoint: Checkpoint, old: str, new: str) -> list[str]:
    """Copy an expert with its task, head and scores.

    ``ner=ner2`` gives an expert ``ner2`` and a task ``ner2`` that it serves. Several tasks are named by
    ``new_task_names``. An expert that serves no task alone is copied without tasks.

    Raises:
        ConfigError: If there is no such expert, or a new name is taken or not allowed.
    """
    model = checkpoint.model
    expert = model.experts.get(old)
    served = [task for task, slot in model.tasks.items() if slot.experts == (old,) and not slot.joint]
    names = new_task_names(served, expert=old, new=new)
    check_new_names(checkpoint, experts=[new], tasks=list(names.values()))
    model.experts.add(replace(expert, name=new))
    for task, copied in names.items():
        checkpoint.tasks[copied] = checkpoint.tasks[task].model_copy(update={"name": copied})
        slot, head = model.tasks[task], model.head(task)
        twin = model.add_task(
            copied, expert=new, level=slot.level, num_outputs=head.linear.out_features, shared=slot.shared
        )
        twin.load_state_dict(head.state_dict())
        if task in checkpoint.metrics:
            checkpoint.metrics[copied] = scores_without_gate(checkpoint.metrics[task])
    set_sources(checkpoint, {copied: checkpoint.config.sources.get(task) for task, copied in names.items()})
    with_tasks = f", which serves {listed_tasks(names.values())}" if names else "; it serves no task"
    return [f"Copied expert {old!r} to {new!r}{with_tasks}.", *drop_gate(checkpoint)]


def prune_expert(checkpoint: Checkpoint, name: str, rank: int) -> list[str]:
    """Lower the rank of an expert and drop the scores of its tasks; the sentences give the error of each delta.

    Raises:
        ConfigError: If there is no such expert, or the rank is below 1 or above the present one.
    """
    pruned = pruned_expert(checkpoint.model.experts.get(name), rank)
    checkpoint.model.experts.replace(pruned.expert)
    checkpoint.model.requires_grad_(False)
    sentences = [
        f"Pruned expert {name!r} to rank {rank}. Relative error of its deltas: {pruned.error:.4f} in all; by layer:",
        *(f"  {error:.4f}  {module}" for module, error in pruned.errors.items()),
    ]
    gate = checkpoint.model.sequence_gate
    if gate is not None and gate.trunk_expert == name:  # it was fitted on the states of the whole expert
        sentences += drop_gate(checkpoint)
    scored = [task for task in tasks_using(checkpoint, name) if checkpoint.metrics.pop(task, None) is not None]
    if scored:
        sentences.append(f"The scores of {listed_tasks(scored)} are dropped; `sparse-ft evaluate` measures them anew.")
    return sentences
