"""The parameters in training, in groups that are clipped and scored together, and the optimizer over them."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sparse_ft.config import RunConfig
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.training.joint import has_gate


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that are trained together, because they have parameters in common."""

    tasks: list[str]
    """Tasks whose mean validation score decides which state is best."""
    parameters: dict[str, nn.Parameter]
    """Parameters by a name that is unique in the run: ``<owner>/<part>.<rest>``; the part is expert, head or gate."""
    tied: list[list[nn.Parameter]] = field(default_factory=list)
    """Lists of parameters that begin equal, and stay equal because each gets the sum of their gradients."""

    def sum_tied(self) -> None:
        """Give tied parameters the sum of their gradients."""
        for parameters in self.tied:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                total = torch.stack(gradients).sum(0)
                for parameter in parameters:
                    parameter.grad = total.clone()


def task_groups(model: SparseExpertModel, tasks: Sequence[str], *, run: RunConfig) -> dict[str, TaskGroup]:
    """Return the groups of a run: one a task, one for tasks that share an expert, or one of all tasks in a joint run.

    Args:
        model: With experts and a head for each task, and a gate in a joint run.
        tasks: Names of the tasks in training.
        run: The run's config.
    """
    frozen = frozen_experts(run, model)
    if run.stage != "joint":
        return {
            "+".join(members): TaskGroup(members, _trainable(model, members, frozen=frozen))
            for members in _connected_tasks(model, tasks, frozen=frozen)
        }
    parameters = _trainable(model, tasks, frozen=frozen)
    if has_gate(run):
        assert model.gate is not None
        parameters.update({f"gate/gate.{name}": value for name, value in model.gate.classifier.named_parameters()})
    return {"joint": TaskGroup(list(tasks), parameters, _tied(model, tasks) if run.experts.shared_a else [])}


def frozen_experts(run: RunConfig, model: SparseExpertModel) -> set[str]:
    """Return the experts that a run does not change: those that it names, and the shared one of its checkpoint."""
    kept = {model.trunk_expert} - {None} if run.stage == "experts" else set()
    return {*run.experts.frozen, *map(str, kept)}


def _trainable(model: SparseExpertModel, tasks: Sequence[str], *, frozen: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of the heads and of the experts that are not frozen, each once."""
    parameters: dict[str, nn.Parameter] = {}
    for task in tasks:
        parameters |= {f"{task}/head.{name}": value for name, value in model.head(task).named_parameters()}
        for expert in [name for name in model.tasks[task].used if name not in frozen]:
            tensors = model.experts.parameters(expert)
            parameters |= {f"{expert}/expert.{name}": value for name, value in tensors.items() if value.numel()}
    return parameters


def _connected_tasks(model: SparseExpertModel, tasks: Sequence[str], *, frozen: Collection[str]) -> list[list[str]]:
    """Group tasks that have a trainable expert in common."""
    groups: list[list[str]] = []
    for task in tasks:
        used = set(model.tasks[task].used) - set(frozen)
        joined = [group for group in groups if any(used & set(model.tasks[other].used) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*itertools.chain(*joined), task])
    return groups


def _tied(model: SparseExpertModel, tasks: Sequence[str]) -> list[list[nn.Parameter]]:
    """Return, for each layer, the A of all experts of the pool."""
    experts = dict.fromkeys(expert for task in tasks for expert in model.tasks[task].experts)
    pool = [model.experts.parameters(expert) for expert in experts]
    return [[tensors[name] for tensors in pool] for name in pool[0] if name.endswith(".lora_A")]


def build_optimizer(parameters: Mapping[str, nn.Parameter], run: RunConfig) -> torch.optim.AdamW:
    """Return AdamW with a learning rate a part; the schedule scales the ``base_lr`` of its groups."""
    settings = run.train
    rates = {
        "expert.": settings.learning_rate,
        "head.": settings.head_learning_rate or settings.learning_rate,
        "gate.": run.gate.learning_rate,
    }
    groups = []
    for part, rate in rates.items():
        members = [value for name, value in parameters.items() if name.partition("/")[2].startswith(part)]
        if members:
            groups.append({"params": members, "lr": rate, "base_lr": rate})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
