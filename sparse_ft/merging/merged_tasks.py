"""The tasks of a merged expert: tasks with the same labels become one, whose head is made of theirs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.settings import AVERAGE, SEPARATE
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec


@dataclass(frozen=True)
class PartTask:
    """A task of one of the experts that are merged."""

    name: str
    """Name in the gathered checkpoint, unlike that of any other task."""
    called: str
    """Name in the checkpoint that it comes from, which the merged task takes."""
    expert: str
    spec: TaskSpec
    head: dict[str, Tensor]
    source: str | None
    """Where its data is, if not where its task file says."""


@dataclass(frozen=True)
class MergedTask:
    """A task of the merged expert."""

    spec: TaskSpec
    """Spec of the first part, under the name of the merged task."""
    parts: tuple[PartTask, ...]

    def spec_of(self, part: PartTask) -> TaskSpec:
        """Return the task that reads the rows of a part, with the name and the order of labels of this one."""
        return part.spec.with_labels(self.spec.label_names or []).model_copy(update={"name": self.spec.name})


def part_tasks(checkpoint: Checkpoint, *, called: Mapping[str, str]) -> list[PartTask]:
    """Copy the tasks of a checkpoint out of it.

    Args:
        checkpoint: Each of its tasks has one expert.
        called: Task to the name that the merged task takes, where that is another.
    """
    model, sources = checkpoint.model, checkpoint.config.sources
    return [
        PartTask(
            name,
            called=called.get(name, name),
            expert=model.tasks[name].experts[0],
            spec=spec,
            head={key: value.detach().cpu().clone() for key, value in model.head(name).state_dict().items()},
            source=sources.get(name),
        )
        for name, spec in checkpoint.tasks.items()
    ]


def group_tasks(parts: Sequence[PartTask], *, heads: str) -> list[MergedTask]:
    """Group the tasks of the experts into the tasks of the merged expert.

    Args:
        parts: All tasks of the experts.
        heads: ``average`` and the name of an expert make one task of those with the same kind, language and label
            names; ``separate`` keeps all apart.

    Raises:
        ConfigError: If two tasks that stay apart have the same name, or ``heads`` is unknown or names an expert that
            does not serve every group.
    """
    experts = list(dict.fromkeys(part.expert for part in parts))
    if heads not in (AVERAGE, SEPARATE, *experts):
        raise ConfigError(unknown_name("value of --heads", heads, (AVERAGE, SEPARATE, *experts)))
    groups: dict[object, list[PartTask]] = {}
    for part in parts:
        labels = frozenset(part.spec.label_names or [])
        alike = (part.spec.kind, part.spec.reads, part.spec.language, labels)
        groups.setdefault(part.name if heads == SEPARATE or not labels else alike, []).append(part)
    _check_groups(groups.values(), heads=heads)
    return [
        MergedTask(members[0].spec.model_copy(update={"name": members[0].called}), tuple(members))
        for members in groups.values()
    ]


def _check_groups(groups: Iterable[list[PartTask]], *, heads: str) -> None:
    """Refuse two groups of one name, and groups without the expert whose head they shall take."""
    firsts: dict[str, PartTask] = {}
    for members in groups:
        first = firsts.setdefault(members[0].called, members[0])
        if first is not members[0]:
            reason = "of another kind, language or labels" if heads != SEPARATE else "kept apart by --heads separate"
            raise ConfigError(
                f"Two tasks are named {first.called!r}, {reason}: of the experts {first.expert!r} and "
                f"{members[0].expert!r}. Give one another name: NAME=CHECKPOINT/experts/EXPERT, or `sparse-ft edit "
                "--copy`."
            )
        experts = [part.expert for part in members]
        if heads not in (AVERAGE, SEPARATE, *experts) and len(members) > 1:
            raise ConfigError(
                f"Task {first.called!r} is made of those of {', '.join(map(repr, experts))}, and --heads {heads!r} is "
                "none of them. Leave --heads out to average their heads."
            )


def merged_head(task: MergedTask, *, weights: Mapping[str, float], heads: str) -> dict[str, Tensor]:
    """Return the weights of a task's head, with the outputs in the order of the task's labels.

    Args:
        task: From ``group_tasks``.
        weights: Weight of each expert. Those below 0 count as 0; if none is above 0, all count the same.
        heads: ``average``, or the name of the expert whose head is taken where there are several.
    """
    if len(task.parts) == 1:
        return task.parts[0].head
    parts = [part for part in task.parts if heads in (AVERAGE, part.expert)]
    shares = torch.tensor([max(0.0, weights[part.expert]) for part in parts], dtype=torch.float64)  # [N]
    shares = shares / shares.sum() if heads == AVERAGE and shares.any() else torch.full_like(shares, 1 / len(parts))
    kind = find_kind(task.spec.kind)
    outputs = kind.outputs(task.spec.label_names or [])
    merged = {}
    for key in task.parts[0].head:
        tensors = []
        for part in parts:
            theirs = kind.outputs(part.spec.label_names or [])
            tensors.append(part.head[key].double()[[theirs.index(output) for output in outputs]])
        merged[key] = torch.einsum("n,n...->...", shares, torch.stack(tensors)).float()
    return merged


def install(
    model: SparseExpertModel, expert: Expert, tasks: Sequence[MergedTask], *, weights: Mapping[str, float], heads: str
) -> None:
    """Replace all experts, tasks and heads of a model by one expert and its tasks, and drop the gate.

    Args:
        model: Changed in place.
        expert: The merged expert.
        tasks: Tasks of the merged expert.
        weights: As for ``merged_head``.
        heads: As for ``merged_head``.
    """
    for name in list(model.tasks):
        model.remove_task(name)
    for name in list(model.experts.names):
        model.experts.remove(name)
    model.experts.add(expert)
    for task in tasks:
        state = merged_head(task, weights=weights, heads=heads)
        kind = find_kind(task.spec.kind)
        num_outputs = len(kind.outputs(task.spec.label_names or []))
        head = model.add_task(task.spec.name, expert=expert.name, level=kind.level, num_outputs=num_outputs)
        head.load_state_dict(state)
    model.gate = None
    model.eval().requires_grad_(False)
