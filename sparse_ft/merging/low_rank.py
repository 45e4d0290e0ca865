"""The nearest delta of lower rank: of a LoRA without building the dense matrix, and of a dense matrix.

Shapes: I inputs, O outputs, r rank before, k rank after.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_ft.errors import ConfigError
from sparse_ft.experts.named_experts import Expert

_NOTHING = 1e-12
"""Times the largest singular value: what is smaller is rounding."""


@dataclass(frozen=True)
class Truncation:
    """A delta of lower rank, and what it lost."""

    lora_a: Tensor
    """[k, I], rows of length 1 at right angles."""
    lora_b: Tensor
    """[O, k]"""
    norm: float
    """Frobenius norm of B A before."""
    lost: float
    """Frobenius norm of the difference, the least there can be at this rank."""


@dataclass(frozen=True)
class Pruned:
    """An expert of lower rank, and how far it is from what it was: relative Frobenius errors, 0 to 1."""

    expert: Expert
    error: float
    """Of all its deltas together."""
    errors: dict[str, float]
    """Of each, by module; 0 where the rank was small enough already."""


def prune(expert: Expert, rank: int) -> Pruned:
    """Replace each delta of an expert by the nearest one of a lower rank; its alpha stays.

    Args:
        expert: Stays as it is.
        rank: 1 to the largest that it has; layers of this rank or a lower one do not change.

    Raises:
        ConfigError: If the rank is outside of that.
    """
    present = max(expert.ranks.values(), default=0)
    if not 1 <= rank <= present:
        raise ConfigError(f"Expert {expert.name!r} has rank {present}, and was to get {rank}. Choose 1 to {present}.")
    deltas, norms, losses = {}, {}, {}
    for module, (lora_a, lora_b) in expert.deltas.items():
        before = expert.ranks[module]
        found = truncate(lora_a, lora_b, min(rank, before))
        norms[module], losses[module] = found.norm / before, found.lost / before
        # B A is scaled by alpha / rank, and the rank has changed.
        smaller = (found.lora_a, found.lora_b * (len(found.lora_a) / before))
        deltas[module] = smaller if before > rank else (lora_a, lora_b)
    return Pruned(
        replace(expert, deltas=deltas),
        _ratio(math.hypot(*losses.values()), math.hypot(*norms.values())),
        {module: _ratio(losses[module], norms[module]) for module in deltas},
    )


def _ratio(lost: float, norm: float) -> float:
    return lost / norm if norm else 0.0


def truncate(lora_a: Tensor, lora_b: Tensor, rank: int) -> Truncation:
    """Approximate B A by the product of rank ``rank`` that is nearest to it.

    Eckart and Young 1936, https://doi.org/10.1007/BF02288367. With B = Q R and A' = P S, the singular values of B A are
    those of R S', which is r x r; all of it in float64.

    Args:
        lora_a: [r, I].
        lora_b: [O, r].
        rank: 1 to r; the outcome has fewer rows where I or O is smaller.
    """
    left, values, right = _thin_svd(lora_a, lora_b)
    # All of the size goes into B, as in a LoRA that was trained from B = 0: one that is still zero can learn on.
    return Truncation(
        right[:rank].to(lora_a.dtype),
        (left[:, :rank] * values[:rank]).to(lora_b.dtype),
        norm=float(values.norm()),
        lost=float(values[rank:].norm()),
    )


def factor(delta: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncation:
    """Approximate a dense delta by a product B A, the nearest one of its rank (see ``truncate``).

    Args:
        delta: [O, I] float64.
        rank: Largest rank.
        energy: Share of the squared Frobenius norm to keep, above 0 to 1, by the lowest rank that does.

    Returns:
        Factors in float64; their rank is not above that of ``delta``, and 0 for a delta of zeros.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return _cut(left, values, right, rank=rank, energy=energy)


def factor_product(
    lora_a: Tensor, lora_b: Tensor, *, rank: int | None = None, energy: float | None = None
) -> Truncation:
    """Do what ``factor`` does for the delta B A, without building it.

    Args:
        lora_a: [r, I].
        lora_b: [O, r].
        rank: Largest rank.
        energy: As of ``factor``.
    """
    left, values, right = _thin_svd(lora_a, lora_b)
    # Parts that cancel leave rounding, in proportion to the parts.
    scale = float(lora_a.double().norm() * lora_b.double().norm())
    return _cut(left, values.where(values > _NOTHING * scale, 0.0), right, rank=rank, energy=energy)


def _thin_svd(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular vectors [O, k] and [k, I] and values [k] of B A in float64, k the least of r, O and I."""
    q_b, r_b = torch.linalg.qr(lora_b.double())
    q_a, r_a = torch.linalg.qr(lora_a.double().t())
    left, values, right = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ left, values, right @ q_a.t()


def _cut(left: Tensor, values: Tensor, right: Tensor, *, rank: int | None, energy: float | None) -> Truncation:
    found = int((values > _NOTHING * values[0]).sum())
    if rank is not None:
        found = min(found, rank)
    if energy is not None:
        shares = values.square().cumsum(0) / values.square().sum()
        found = min(found, 1 + int((shares < energy).sum()))
    return Truncation(
        right[:found], left[:, :found] * values[:found], norm=float(values.norm()), lost=float(values[found:].norm())
    )
