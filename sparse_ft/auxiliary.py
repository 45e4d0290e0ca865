"""What a gate did in a training step: its auxiliary losses, how it used the experts, and an alarm if they collapse.

Shapes: N rows, S tokens a row, E experts of the gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ft.config import GateConfig
from sparse_ft.experts.routing import Routing
from sparse_ft.losses import load_balancing_loss, routing_cross_entropy, z_loss

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
        weights = routing.spread(num_experts).detach()[..., list(places)] * real.unsqueeze(-1)
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
