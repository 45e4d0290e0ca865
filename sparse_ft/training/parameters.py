"""What learns in a run, in groups that are clipped and scored together, and the optimizer over them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sparse_ft.config import RunConfig
from sparse_ft.experts.gates import TokenGate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.training.joint import has_gate


@dataclass(frozen=True)
class Group:
    """Parameters whose best state is chosen together."""

    tasks: list[str]
    """The mean of their validation scores decides which state is best."""
    parameters: dict[str, nn.Parameter]
    """By a name that is unique in the run: ``<owner>/<part>.<rest>``, the part being expert, head or gate."""
    tied: list[list[nn.Parameter]] = field(default_factory=list)
    """Parameters that stay equal, as they begin equal and always get the sum of their gradients."""

    def sum_tied(self) -> None:
        """Give tied parameters the sum of their gradients."""
        for parameters in self.tied:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                total = torch.stack(gradients).sum(0)
                for parameter in parameters:
                    parameter.grad = total.clone()


def find_groups(model: SparseExpertModel, tasks: Sequence[str], *, run: RunConfig) -> dict[str, Group]:
    """Return what the run trains: a group a task, one for tasks that share an expert, or one of all in a joint run.

    Args:
        model: Has experts and a head for each task, and a gate in a joint run.
        tasks: That are trained.
        run: The run's config.
    """
    if run.stage != "joint":
        return {
            "+".join(members): Group(members, _learnt(model, members, frozen=run.experts.frozen))
            for members in _sharing(model, tasks, frozen=run.experts.frozen)
        }
    parameters = _learnt(model, tasks, frozen=run.experts.frozen)
    if has_gate(run):
        assert model.gate is not None
        classifier = model.gate.linears if isinstance(model.gate, TokenGate) else model.gate.classifier
        parameters.update({f"gate/gate.{name}": value for name, value in classifier.named_parameters()})
    return {"joint": Group(list(tasks), parameters, _tied(model, tasks) if run.experts.shared_a else [])}


def _learnt(model: SparseExpertModel, tasks: Sequence[str], *, frozen: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the heads and experts of tasks, an expert that several share only once, a frozen one not at all."""
    found: dict[str, nn.Parameter] = {}
    for task in tasks:
        found.update({f"{task}/head.{name}": value for name, value in model.head(task).named_parameters()})
        for expert in [name for name in model.tasks[task].used if name not in frozen]:
            learnt = {name: value for name, value in model.experts.parameters(expert).items() if value.numel()}
            found.update({f"{expert}/expert.{name}": value for name, value in learnt.items()})
    return found


def _sharing(model: SparseExpertModel, tasks: Sequence[str], *, frozen: Sequence[str]) -> list[list[str]]:
    """Put tasks together that have an expert in common which learns."""
    found: list[list[str]] = []
    for task in tasks:
        used = set(model.tasks[task].used) - set(frozen)
        meets = [group for group in found if any(used & set(model.tasks[other].used) for other in group)]
        found = [group for group in found if group not in meets]
        found.append([*itertools.chain(*meets), task])
    return found


def _tied(model: SparseExpertModel, tasks: Sequence[str]) -> list[list[nn.Parameter]]:
    """Return the A of each layer for all experts of the pool."""
    experts = list(dict.fromkeys(expert for task in tasks for expert in model.tasks[task].experts))
    pool = [model.experts.parameters(expert) for expert in experts]
    return [[owned[name] for owned in pool] for name in pool[0] if name.endswith(".lora_A")]


def build_optimizer(parameters: Mapping[str, nn.Parameter], run: RunConfig) -> torch.optim.AdamW:
    """Return AdamW with a rate for each part; ``base_lr`` of its groups is what the schedule scales."""
    settings = run.train
    rates = {
        "expert.": settings.learning_rate,
        "head.": settings.head_learning_rate or settings.learning_rate,
        "gate.": run.gate.learning_rate,
    }
    groups = [
        {
            "params": [value for name, value in parameters.items() if name.partition("/")[2].startswith(part)],
            "lr": rate,
            "base_lr": rate,
        }
        for part, rate in rates.items()
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, weight_decay=settings.weight_decay, fused=True)
