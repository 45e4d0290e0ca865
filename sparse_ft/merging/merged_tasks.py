"""The tasks of a merged expert: those with the same labels become one, whose head is made of theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec

AVERAGE, SEPARATE = "average", "separate"


@dataclass(frozen=True)
class PartTask:
    """A task of one of the experts that are merged."""

    name: str
    """Unlike that of any other."""
    called: str
    """Its name where it comes from, which the outcome takes."""
    expert: str
    spec: TaskSpec
    head: dict[str, Tensor]
    source: str | None
    """Where its data is, if not where its file says."""


@dataclass(frozen=True)
class MergedTask:
    """A task of the merged expert."""

    spec: TaskSpec
    """That of the first of ``parts``, named as in the outcome."""
    parts: tuple[PartTask, ...]

    def spec_of(self, part: PartTask) -> TaskSpec:
        """Return the task that reads the rows of a part and is answered by this one: its labels are in this order."""
        return part.spec.with_labels(self.spec.label_names or []).model_copy(update={"name": self.spec.name})


def part_tasks(checkpoint: Checkpoint, *, called: Mapping[str, str]) -> list[PartTask]:
    """Copy the tasks of a checkpoint out of it.

    Args:
        checkpoint: Each of its tasks has one expert.
        called: Task to what its name shall be, where that is another.
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
    """Say which tasks the merged expert will have.

    Args:
        parts: All tasks of the experts.
        heads: ``average`` and the name of an expert make one task of those with the same kind, language and label
            names; ``separate`` keeps all apart.

    Raises:
        ConfigError: If two tasks that stay apart have the same name, or ``heads`` is unknown.
    """
    experts = list(dict.fromkeys(part.expert for part in parts))
    if heads not in (AVERAGE, SEPARATE, *experts):
        raise ConfigError(unknown_name("choice of --heads", heads, (AVERAGE, SEPARATE, *experts)))
    groups: dict[object, list[PartTask]] = {}
    for part in parts:
        labels = frozenset(part.spec.label_names or [])
        alike = (part.spec.kind, part.spec.reads, part.spec.language, labels)
        groups.setdefault(part.name if heads == SEPARATE or not labels else alike, []).append(part)
    found: dict[str, MergedTask] = {}
    for members in groups.values():
        name = members[0].called
        if name in found:
            first, second = found[name].parts[0], members[0]
            reason = "of another kind, language or labels" if heads != SEPARATE else "kept apart by --heads separate"
            raise ConfigError(
                f"Two tasks are named {name!r}, {reason}: of the experts {first.expert!r} and {second.expert!r}. Give "
                f"one another name: NAME=CHECKPOINT/experts/EXPERT, or `sparse-ft edit --copy`."
            )
        found[name] = MergedTask(members[0].spec.model_copy(update={"name": name}), tuple(members))
    if heads not in (AVERAGE, SEPARATE):
        for task in found.values():
            if len(task.parts) > 1 and heads not in [part.expert for part in task.parts]:
                others = ", ".join(repr(part.expert) for part in task.parts)
                raise ConfigError(
                    f"Task {task.spec.name!r} is made of those of {others}, and --heads {heads!r} is none of them. "
                    "Leave it out to average their heads."
                )
    return list(found.values())


def merged_head(task: MergedTask, *, weights: Mapping[str, float], heads: str) -> dict[str, Tensor]:
    """Return the weights of a task's head.

    Args:
        task: Of ``group_tasks``.
        weights: Of each expert; one that is taken out (below 0) has no say, and without any above 0 all count the same.
        heads: ``average``, or the name of the expert whose head is taken where several have one.
    """
    if len(task.parts) == 1:
        return task.parts[0].head
    chosen = [part for part in task.parts if heads in (AVERAGE, part.expert)]
    says = torch.tensor([max(0.0, weights[part.expert]) for part in chosen], dtype=torch.float64)
    says = says / says.sum() if heads == AVERAGE and says.any() else torch.full_like(says, 1 / len(chosen))
    kind, labels = find_kind(task.spec.kind), task.spec.label_names or []
    found = {}
    for key in task.parts[0].head:
        rows = []
        for part in chosen:
            theirs = kind.outputs(part.spec.label_names or [])
            rows.append(part.head[key].double()[[theirs.index(output) for output in kind.outputs(labels)]])
        found[key] = torch.einsum("n,n...->...", says, torch.stack(rows)).float()
    return found


def install(
    model: SparseExpertModel, expert: Expert, tasks: Sequence[MergedTask], *, weights: Mapping[str, float], heads: str
) -> None:
    """Make an expert with its tasks all that a model has; the backbone stays."""
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
