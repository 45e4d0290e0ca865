"""Rename the tasks of a checkpoint and their labels; no answer changes but by its name."""

from collections.abc import Mapping
from typing import Any

from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.merging.bookkeeping import check_new_names, set_sources
from sparse_ft.tasks.kinds import find_kind


def rename_task(checkpoint: Checkpoint, old: str, new: str) -> list[str]:
    """Give a task another name, with its head, scores and data; its expert keeps its name.

    Raises:
        ConfigError: If there is no such task, or the new name is taken or not allowed.
    """
    model = checkpoint.model
    head = model.head(old)
    check_new_names(checkpoint, experts=[], tasks=[new])
    names = {task: new if task == old else task for task in model.tasks}
    slots = {names[task]: slot for task, slot in model.tasks.items()}
    slot = slots[new]
    model.remove_task(old)
    twin = model.add_task(
        new,
        expert=slot.experts,
        level=slot.level,
        num_outputs=head.linear.out_features,
        joint=slot.joint,
        shared=slot.shared,
    )
    twin.load_state_dict(head.state_dict())
    model.eval().requires_grad_(False)
    model.tasks = slots  # in the order of before
    checkpoint.tasks = {names[task]: spec for task, spec in checkpoint.tasks.items()}
    checkpoint.tasks[new] = checkpoint.tasks[new].model_copy(update={"name": new})
    checkpoint.metrics = {names.get(task, task): scores for task, scores in checkpoint.metrics.items()}
    set_sources(checkpoint, {new: checkpoint.config.sources.get(old), old: None})
    return [f"Renamed task {old!r} to {new!r}; it is served by {', '.join(map(repr, slot.experts))} as before."]


def rename_label(checkpoint: Checkpoint, task: str, old: str, new: str) -> list[str]:
    """Give a label, or a type of entities, another name in answers and scores; the data may keep the old one.

    Raises:
        ConfigError: If there is no such task or label, or the new name is taken or empty.
    """
    checkpoint.model.head(task)
    spec = checkpoint.tasks[task]
    labels = spec.label_names or []
    if not spec.has_labels or old not in labels:
        raise ConfigError(unknown_name(f"label of task {task!r}", old, labels if spec.has_labels else []))
    if new in labels or not new.strip():
        raise ConfigError(f"Task {task!r} cannot rename {old!r} to {new!r}: the name is empty or taken.")

    def renamed(mapping: Mapping[str, str]) -> dict[str, str]:
        return {source: new if name == old else name for source, name in mapping.items()}

    changes: dict[str, Any] = {
        "labels": renamed(spec.labels if isinstance(spec.labels, dict) else {name: name for name in labels})
    }
    if spec.out_of_scope == old:
        changes["out_of_scope"] = new
    if spec.hub is not None and spec.hub.labels is not None:
        changes["hub"] = spec.hub.model_copy(update={"labels": renamed(spec.hub.labels)})
    checkpoint.tasks[task] = spec.model_copy(update=changes)
    outputs = find_kind(spec.kind).outputs
    columns = dict(zip(outputs(labels), outputs(list(renamed({name: name for name in labels}).values())), strict=True))
    if task in checkpoint.metrics:
        checkpoint.metrics[task] = _renamed_scores(checkpoint.metrics[task], {**columns, old: new})
    return [f"Renamed label {old!r} of task {task!r} to {new!r}."]


def _renamed_scores(scores: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename labels in the tables of a task's scores."""
    changed = dict(scores)
    for table in ("report", "token_report"):
        if table in scores:
            changed[table] = {names.get(label, label): figures for label, figures in scores[table].items()}
    if "confusion" in scores:
        confusion = scores["confusion"]
        changed["confusion"] = {**confusion, "labels": [names.get(label, label) for label in confusion["labels"]]}
    if "unseen_labels" in scores:
        changed["unseen_labels"] = [names.get(label, label) for label in scores["unseen_labels"]]
    return changed
