"""Auxiliary losses of a gate, each a pure function of its logits; padding never counts.

All compute in float32, or in float64 if the logits are, and give 0 for a batch without any real token. Shapes: N rows,
S tokens a row, T = N or N * S decisions, E experts, K experts chosen per decision.
"""

import torch
from torch import Tensor
from torch.nn import functional


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
