"""The shared form: one expert for all tasks in the lower blocks, small experts of their own above it.

The answers of N tasks to one text then cost 1 + (N - 1) * own / blocks passes. Shapes: I inputs and O outputs of a
linear, k rank.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_ft.config import RunConfig
from sparse_ft.experts.low_rank import truncate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.training.joint import SHARED
from sparse_ft.training.teachers import Teacher


def shared_alpha(run: RunConfig) -> float:
    """Return the alpha of the shared expert, whose alpha / rank falls with the root of the rank.

    rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732. At the rank of the other experts it is theirs.
    """
    return run.experts.alpha * math.sqrt(run.shared.rank / run.experts.rank)


@torch.no_grad()
def start_from_teachers(model: SparseExpertModel, teachers: Mapping[str, Teacher]) -> list[str]:
    """Initialise the shared expert, the own experts and the heads from the teachers.

    The shared expert begins as the mean of the teachers' deltas, an own expert as its teacher's minus the shared one.

    Args:
        model: With the shared expert, and an expert and a head of each task.
        teachers: Of the tasks. One on another backbone or with another pooling gives its answers only, one of several
            experts its answers and its head.

    Returns:
        The tasks that start from an expert of their teacher.
    """
    known = {
        name: teacher
        for name, teacher in teachers.items()
        if teacher.checkpoint.model.backbone.weights_sha256 == model.backbone.weights_sha256
        and teacher.checkpoint.model.pooling == model.pooling
    }
    experts = {name: expert for name, teacher in known.items() if (expert := teacher.expert) is not None}
    if experts:
        model.experts.replace(_mean_expert(model.experts.get(SHARED), list(experts.values())))
    shared = model.experts.get(SHARED)
    for name, expert in experts.items():
        (own,) = model.tasks[name].experts
        model.experts.replace(_own_expert(model.experts.get(own), expert, shared))
    for name, teacher in known.items():
        model.head(name).load_state_dict(teacher.checkpoint.model.head(teacher.spec.name).state_dict())
    return list(experts)


def _mean_expert(start: Expert, experts: list[Expert]) -> Expert:
    """Return the mean of experts at the rank of ``start``, whose random rows fill a rank that the mean lacks."""
    deltas = {module: _mean_delta(start, module, experts) for module in start.deltas}
    tables = [expert.word_shapes for expert in experts if expert.word_shapes is not None]
    table = start.word_shapes
    if table is not None and tables:
        table = torch.stack(tables).mean(0)
    return Expert(start.name, start.alpha, deltas, table, start.shapes_block)


def _mean_delta(start: Expert, module: str, experts: list[Expert]) -> tuple[Tensor, Tensor]:
    """Return the mean delta of experts on one linear."""
    return _sum_of_deltas(start, module, [(1 / len(experts), expert) for expert in experts])


def _own_expert(start: Expert, teacher: Expert, shared: Expert) -> Expert:
    """Return a task's own expert, so that together with the shared one it is near the teacher."""
    parts = [(1.0, teacher), (-1.0, shared)]
    return Expert(start.name, start.alpha, {module: _sum_of_deltas(start, module, parts) for module in start.deltas})


def _sum_of_deltas(start: Expert, module: str, parts: list[tuple[float, Expert]]) -> tuple[Tensor, Tensor]:
    """Return A [k, I] and B [O, k], of the rank and scale of ``start``, nearest to a weighted sum of deltas."""
    lora_a, lora_b = (part.clone() for part in start.deltas[module])
    changing = [(weight, expert) for weight, expert in parts if module in expert.ranks]
    if not changing:
        return lora_a, lora_b
    every_a = torch.cat([expert.deltas[module][0] for _, expert in changing])
    every_b = torch.cat([weight * e.alpha / e.ranks[module] * e.deltas[module][1] for weight, e in changing], 1)
    cut = truncate(every_a, every_b, min(len(lora_a), len(every_a)))
    rank = len(cut.lora_a)
    lora_a[:rank], lora_b[:, :rank] = cut.lora_a, cut.lora_b / (start.alpha / len(lora_a))
    return lora_a, lora_b
