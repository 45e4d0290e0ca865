"""What a gate did in a training step: its auxiliary losses, how it used the experts, and an alarm if they collapse.

Shapes: N rows, S tokens a row, E experts of the gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.config import GateConfig
from sparse_ft.experts.routing import Routing

_IDLE = 0.1
"""An expert with less than this part of an even share is not used."""
_OVERLOADED = 3.0
"""An expert of a pool with more than so many even shares takes over …"""
_MOST = 0.9
"""… or with this share of everything, whichever is less."""


@dataclass(frozen=True)
class Auxiliary:
    """What the gate did in one pass, as means over its blocks."""

    total: Tensor
    """The weighted sum of the losses, a scalar that is trained on."""
    losses: dict[str, float]
    """``balance``, ``z`` and ``routing`` before they are weighted, and ``dropped``, the share of choices that were lost
    because an expert was full."""
    usage: Tensor
    """[E], the share of the weight that each expert got."""


def auxiliary(
    routings: Sequence[Routing],
    *,
    places: Sequence[int],
    num_experts: int,
    settings: GateConfig,
    top_k: int,
    targets: Tensor,
    mask: Tensor | None = None,
) -> Auxiliary:
    """Compute the auxiliary losses of one pass.

    Args:
        routings: What the gate said, one for each block that it was asked at; of rows, or of tokens.
        places: Of the gate's experts among those of the model, (E,).
        num_experts: Of the model.
        settings: Weights of the losses.
        top_k: Experts that the gate chooses.
        targets: [N], the gate's index of each row's own expert, or -100 where any will do.
        mask: [N, S], 1 for real tokens; None for routings of rows.
    """
    found: dict[str, list[Tensor]] = {"balance": [], "z": [], "routing": [], "dropped": []}
    shares = []
    for routing in routings:
        assert routing.logits is not None
        tempered, experts = routing.logits / settings.temperature, _chosen(routing, top_k, places)
        found["balance"].append(load_balancing_loss(tempered, experts=experts, mask=mask))
        found["z"].append(z_loss(routing.logits, mask=mask))
        found["routing"].append(routing_cross_entropy(routing.logits, targets, mask=mask))
        real = torch.ones_like(routing.logits[..., 0]) if mask is None else mask.to(routing.logits.dtype)
        lost = torch.zeros(()) if routing.dropped is None else routing.dropped.sum()
        found["dropped"].append(lost / (real.sum() * top_k))
        weights = routing.dense_weights(num_experts).detach()[..., list(places)] * real.unsqueeze(-1)
        shares.append(weights.flatten(0, -2).sum(0) / weights.sum().clamp_min(1e-9))
    means = {name: torch.stack(values).mean() for name, values in found.items()}
    total = (
        settings.balance_loss * means["balance"]
        + settings.z_loss * means["z"]
        + settings.routing_loss * means["routing"]
    )
    return Auxiliary(total, {name: value.item() for name, value in means.items()}, torch.stack(shares).mean(0))


def _chosen(routing: Routing, top_k: int, places: Sequence[int]) -> Tensor:
    """Return the gate's experts with the largest logits, [N, K] or [N, S, K]; of a shortlist, where there is one."""
    logits, among = routing.logits, routing.experts
    assert logits is not None
    if among is None or logits.dim() == 2:
        return logits.topk(top_k, dim=-1).indices
    own = torch.zeros(max(places) + 1, dtype=torch.long, device=among.device)  # the model's number to the gate's
    own[list(places)] = torch.arange(len(places), device=among.device)
    listed = own[among].unsqueeze(1).expand(-1, logits.shape[1], -1)  # [N, S, m]
    return listed.gather(-1, logits.gather(-1, listed).topk(top_k, dim=-1).indices)


def alarms(usage: Mapping[str, float], *, settings: GateConfig, rows: Mapping[str, float] | None = None) -> list[str]:
    """Say which experts a gate does not use, or sends nearly everything to.

    Args:
        usage: Expert to its share of the weight, 0 to 1, over an epoch.
        settings: Named in the advice.
        rows: Expert to the share of the rows that are of its task; None for a pool, whose experts should share evenly.
    """
    pool, advice = rows is None, f"Raise gate.balance_loss (now {settings.balance_loss:g}) or gate.jitter"
    advice = f"{advice} (now {settings.jitter:g}){', or lower experts.pool' if pool else ''}."
    found = []
    for name, share in usage.items():
        due = 1 / len(usage) if rows is None else rows.get(name, 0.0)
        other = f"an even share is {due:.1%}" if pool else f"its task has {due:.1%} of the rows"
        about = f"Expert {name!r} got {share:.1%} of the weight, {other}"
        if share < _IDLE * due:
            found.append(f"{about}: it is hardly used. {advice}")
        elif pool and len(usage) > 1 and share > min(_OVERLOADED * due, _MOST):
            found.append(f"{about}: the gate collapses. {advice}")
    return found


def load_balancing_loss(
    logits: Tensor, *, top_k: int = 1, experts: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Penalise experts that get more than their share: E * sum over e of f_e * P_e.

    f_e is the share of choices that fell on expert e, P_e its mean probability. Equation 4 of Fedus et al. 2021,
    https://arxiv.org/abs/2101.03961; with K > 1 all choices count, as for Mixtral, but divided by K:
    https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/mixtral/modeling_mixtral.py.
    An even use of the experts scores 1, one expert for everything scores E. Where experts are tasks, a batch of one
    task therefore scores E if the gate is right: use this over batches that mix tasks, or among the experts of a pool.

    Args:
        logits: [N, E] per row or [N, S, E] per token.
        top_k: K, 1 to E; used if ``experts`` is None.
        experts: [N, K] or [N, S, K] chosen indices, if they are not the largest logits (jitter).
        mask: [N, S], 1 for real tokens; a row counts if it has one. None counts everything.

    Returns:
        A scalar; the gradient flows through P only.
    """
    flat, real = _decisions(logits, mask)
    num_experts = flat.shape[-1]
    chosen = flat.topk(top_k, dim=-1).indices if experts is None else experts.flatten(0, -2)  # [T, K]
    counted = real.to(flat.dtype)
    num_real = counted.sum().clamp_min(1)
    hits = torch.zeros_like(flat).scatter_add(-1, chosen, torch.ones_like(chosen, dtype=flat.dtype))  # [T, E]
    share = (hits * counted.unsqueeze(-1)).sum(0) / (num_real * chosen.shape[-1])  # [E]
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
    """Teach a gate which expert is right, as any classifier is taught.

    Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742, route by task and look the task up; this learns to tell it.

    Args:
        logits: [N, E] per row or [N, S, E] per token.
        targets: [N], or [N, S] to name an expert per token; int64, 0 to E - 1, or -100 for what does not count.
        mask: [N, S], 1 for real tokens; a row counts if it has one. None counts everything.

    Returns:
        A scalar: the mean over what counts.
    """
    flat, real = _decisions(logits, mask)
    if targets.dim() < logits.dim() - 1:
        targets = targets.unsqueeze(-1).expand(logits.shape[:-1])
    kept = torch.where(real, targets.flatten(), -100)
    total = functional.cross_entropy(flat, kept, ignore_index=-100, reduction="sum")
    return total / (kept != -100).sum().clamp_min(1)


def _decisions(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits as [T, E] of at least float32, 0 where they do not count, and which do, [T]."""
    flat = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return flat, torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    real = mask.bool()
    if mask.dim() == logits.dim():
        real = real.any(-1)
    real = real.flatten()
    return torch.where(real.unsqueeze(-1), flat, 0.0), real  # padding may hold anything, even NaN
