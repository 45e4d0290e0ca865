"""The auxiliary losses of a gate in training, its use of the experts, and warnings of a collapse.

Shapes: N rows, S tokens a row, E experts of the gate.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.config import GateConfig
from sparse_ft.experts.groups import Groups
from sparse_ft.experts.routing import Routing

_IDLE = 0.1
"""An expert that gets less than this fraction of an even share counts as unused."""
_OVERLOADED = 3.0
"""An expert of a pool that gets more than this multiple of an even share counts as a collapse."""
_MOST = 0.9
"""An expert of a pool that gets more than this share of all weight counts as a collapse, too."""


class AuxiliaryLosses(NamedTuple):
    """The losses of a gate in one forward pass, as means over its blocks."""

    total: Tensor
    """The weighted sum of the losses, a scalar with a gradient."""
    losses: dict[str, float]
    """``balance``, ``z`` and ``routing`` without their weights, and ``dropped``, the share of selections lost to full
    experts."""
    usage: Tensor
    """[E], the share of the weight that each expert got."""


def auxiliary_losses(
    routings: Sequence[Routing],
    *,
    experts: Sequence[int],
    num_experts: int,
    settings: GateConfig,
    top_k: int,
    targets: Tensor,
    mask: Tensor | None = None,
    partition: Groups | None = None,
) -> AuxiliaryLosses:
    """Compute the auxiliary losses of one forward pass.

    Args:
        routings: Routings of rows or of tokens, one for each block at which the gate decides.
        experts: Index in the model of each expert of the gate, (E,).
        num_experts: Number of experts of the model.
        settings: Weights of the losses.
        top_k: Number of experts that the gate selects.
        targets: [N], the gate's index of the expert of each row's task, or with a partition that of the expert's group;
            -100 for none.
        mask: [N, S], 1 for real tokens; None for routings of rows.
        partition: Groups of the gate's experts. A text may go to any expert of its task's group.
    """
    values: dict[str, list[Tensor]] = {"balance": [], "z": [], "routing": [], "dropped": []}
    shares = []
    for routing in routings:
        assert routing.logits is not None
        tempered, selected = routing.logits / settings.temperature, _selected(routing, top_k, experts)
        values["balance"].append(load_balancing_loss(tempered, experts=selected, mask=mask))
        values["z"].append(z_loss(routing.logits, mask=mask))
        by_group = routing.logits if partition is None else partition.logits(routing.logits)
        values["routing"].append(routing_cross_entropy(by_group, targets, mask=mask))
        real = torch.ones_like(routing.logits[..., 0]) if mask is None else mask.to(routing.logits.dtype)
        lost = torch.zeros(()) if routing.dropped is None else routing.dropped.sum()
        values["dropped"].append(lost / (real.sum() * top_k))
        weights = routing.dense_weights(num_experts).detach()[..., list(experts)] * real.unsqueeze(-1)
        shares.append(weights.flatten(0, -2).sum(0) / weights.sum().clamp_min(1e-9))
    means = {name: torch.stack(losses).mean() for name, losses in values.items()}
    total = (
        settings.balance_loss * means["balance"]
        + settings.z_loss * means["z"]
        + settings.routing_loss * means["routing"]
    )
    return AuxiliaryLosses(total, {name: value.item() for name, value in means.items()}, torch.stack(shares).mean(0))


def _selected(routing: Routing, top_k: int, experts: Sequence[int]) -> Tensor:
    """Return the gate's indices of the largest logits, [N, K] or [N, S, K]; of a shortlist if the gate made one."""
    logits, shortlist = routing.logits, routing.experts
    assert logits is not None
    if shortlist is None or logits.dim() == 2:
        return logits.topk(top_k, dim=-1).indices
    gate_index = torch.zeros(max(experts) + 1, dtype=torch.long, device=shortlist.device)  # by index in the model
    gate_index[list(experts)] = torch.arange(len(experts), device=shortlist.device)
    listed = gate_index[shortlist].unsqueeze(1).expand(-1, logits.shape[1], -1)  # [N, S, m]
    return listed.gather(-1, logits.gather(-1, listed).topk(top_k, dim=-1).indices)


def alarms(usage: Mapping[str, float], *, settings: GateConfig, rows: Mapping[str, float] | None = None) -> list[str]:
    """Return a warning for each expert that the gate hardly uses, or sends nearly everything to.

    Args:
        usage: Expert to its share of the weight over an epoch, 0 to 1.
        settings: Settings that the advice names.
        rows: Expert to the share of rows that belong to its task; None for a pool, which should be used evenly.
    """
    pool, advice = rows is None, f"Raise gate.balance_loss (now {settings.balance_loss:g}) or gate.jitter"
    advice = f"{advice} (now {settings.jitter:g}){', or lower experts.pool' if pool else ''}."
    warnings = []
    for name, share in usage.items():
        due = 1 / len(usage) if rows is None else rows.get(name, 0.0)
        other = f"an even share is {due:.1%}" if pool else f"its task has {due:.1%} of the rows"
        about = f"Expert {name!r} got {share:.1%} of the weight, {other}"
        if share < _IDLE * due:
            warnings.append(f"{about}: it is hardly used. {advice}")
        elif pool and len(usage) > 1 and share > min(_OVERLOADED * due, _MOST):
            warnings.append(f"{about}: the gate collapses. {advice}")
    return warnings


def load_balancing_loss(
    logits: Tensor, *, top_k: int = 1, experts: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Penalise experts that get more than their share: E * sum over e of f_e * P_e.

    f_e is the share of decisions that selected expert e, P_e its mean probability. Equation 4 of Fedus et al. 2021,
    https://arxiv.org/abs/2101.03961; with K > 1 all selected experts count, as in Mixtral, divided by K:
    https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/mixtral/modeling_mixtral.py.
    An even use of the experts scores 1, one expert for everything scores E. Where experts are tasks, a batch of one
    task therefore scores E if the gate is right: use this on batches of several tasks, or among the experts of a pool.

    Args:
        logits: [N, E] per row or [N, S, E] per token.
        top_k: K, 1 to E; used if ``experts`` is None.
        experts: [N, K] or [N, S, K] selected indices, if they are not the largest logits.
        mask: [N, S], 1 for real tokens; a row counts if it has one. None counts everything.

    Returns:
        A scalar; the gradient flows through P only.
    """
    flat, real = _decisions(logits, mask)
    num_experts = flat.shape[-1]
    selected = flat.topk(top_k, dim=-1).indices if experts is None else experts.flatten(0, -2)  # [T, K]
    counted = real.to(flat.dtype)
    num_real = counted.sum().clamp_min(1)
    hits = torch.zeros_like(flat).scatter_add(-1, selected, torch.ones_like(selected, dtype=flat.dtype))  # [T, E]
    share = (hits * counted.unsqueeze(-1)).sum(0) / (num_real * selected.shape[-1])  # [E]
    probability = (flat.softmax(-1) * counted.unsqueeze(-1)).sum(0) / num_real  # [E]
    return num_experts * (share * probability).sum()


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Keep logits small: the mean of log(sum over e of exp(logit_e)) squared.

    Equation 5 of Zoph et al. 2022, "ST-MoE", https://arxiv.org/abs/2202.08906.

    Args:
        logits: [N, E] per row or [N, S, E] per token.
        mask: [N, S], 1 for real tokens; a row counts if it has one. None counts everything.

    Returns:
        A scalar, at least 0.
    """
    flat, real = _decisions(logits, mask)
    counted = real.to(flat.dtype)
    return (flat.logsumexp(-1).square() * counted).sum() / counted.sum().clamp_min(1)


def routing_cross_entropy(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy of the gate against the right experts.

    Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742, look the task up to route by it; this loss learns it.

    Args:
        logits: [N, E] per row or [N, S, E] per token.
        targets: [N], or [N, S] to name an expert per token; int64, 0 to E - 1, or -100 to ignore.
        mask: [N, S], 1 for real tokens; a row counts if it has one. None counts everything.

    Returns:
        A scalar: the mean over the targets that are not ignored.
    """
    flat, real = _decisions(logits, mask)
    if targets.dim() < logits.dim() - 1:
        targets = targets.unsqueeze(-1).expand(logits.shape[:-1])
    counted = torch.where(real, targets.flatten(), -100)
    total = functional.cross_entropy(flat, counted, ignore_index=-100, reduction="sum")
    return total / (counted != -100).sum().clamp_min(1)


def _decisions(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits [T, E] in at least float32, 0 where they are masked, and the mask [T]."""
    flat = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return flat, torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    real = mask.bool()
    if mask.dim() == logits.dim():
        real = real.any(-1)
    real = real.flatten()
    return torch.where(real.unsqueeze(-1), flat, 0.0), real  # padding may hold anything, even NaN
