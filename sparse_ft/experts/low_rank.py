"""The nearest delta of lower rank, to a LoRA without building its dense matrix, and to a dense matrix.

Shapes: I inputs, O outputs, r rank before, k rank after.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_ft.errors import ConfigError
from sparse_ft.experts.named_experts import Expert

_NOTHING = 1e-12
"""Share of the largest singular value below which a singular value is rounding."""


@dataclass(frozen=True)
class Truncation:
    """A delta of lower rank, and its distance from the original."""

    lora_a: Tensor
    """[k, I], rows of length 1 at right angles."""
    lora_b: Tensor
    """[O, k]"""
    norm: float
    """Frobenius norm of the original."""
    lost: float
    """Frobenius norm of the difference from the original, the least possible at this rank."""


@dataclass(frozen=True)
class Pruned:
    """An expert of lower rank, and its distance from the original: relative Frobenius errors, 0 to 1."""

    expert: Expert
    error: float
    """Error of all deltas together."""
    errors: dict[str, float]
    """Error of each delta, by module; 0 where the rank was small enough already."""


def prune(expert: Expert, rank: int) -> Pruned:
    """Replace each delta of an expert by the nearest one of a lower rank; its alpha stays.

    Args:
        expert: Stays as it is.
        rank: 1 to the largest rank of the expert; layers of this rank or a lower one do not change.

    Raises:
        ConfigError: If the rank is out of range.
    """
    present = max(expert.ranks.values(), default=0)
    if not 1 <= rank <= present:
        raise ConfigError(f"Expert {expert.name!r} has rank {present}; {rank} is out of range. Choose 1 to {present}.")
    deltas, norms, losses = {}, {}, {}
    for module, (lora_a, lora_b) in expert.deltas.items():
        before = expert.ranks[module]
        cut = truncate(lora_a, lora_b, min(rank, before))
        norms[module], losses[module] = cut.norm / before, cut.lost / before
        # B A is scaled by alpha / rank, and the rank has changed.
        smaller = (cut.lora_a, cut.lora_b * (len(cut.lora_a) / before))
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
    those of R S', which is r x r. Computed in float64.

    Args:
        lora_a: [r, I].
        lora_b: [O, r].
        rank: 1 to r; the factors have fewer rows where I or O is smaller.
    """
    left, values, right = _thin_svd(lora_a, lora_b)
    # The singular values go into B, as in a LoRA that started from B = 0, so that a delta of zeros can still learn.
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
    """Factor the delta B A as ``factor`` does, without building it.

    Args:
        lora_a: [r, I].
        lora_b: [O, r].
        rank: Largest rank.
        energy: As for ``factor``.
    """
    left, values, right = _thin_svd(lora_a, lora_b)
    # Deltas that cancel leave rounding, in proportion to their size.
    scale = float(lora_a.double().norm() * lora_b.double().norm())
    return _cut(left, values.where(values > _NOTHING * scale, 0.0), right, rank=rank, energy=energy)


def _thin_svd(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular vectors [O, k] and [k, I] and values [k] of B A in float64, k the least of r, O and I."""
    q_b, r_b = torch.linalg.qr(lora_b.double())
    q_a, r_a = torch.linalg.qr(lora_a.double().t())
    left, values, right = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ left, values, right @ q_a.t()


def _cut(left: Tensor, values: Tensor, right: Tensor, *, rank: int | None, energy: float | None) -> Truncation:
    """Keep the singular values above rounding, at most ``rank``, and no more than ``energy`` asks for."""
    size = int((values > _NOTHING * values[0]).sum())
    if rank is not None:
        size = min(size, rank)
    if energy is not None:
        shares = values.square().cumsum(0) / values.square().sum()
        size = min(size, 1 + int((shares < energy).sum()))
    return Truncation(
        right[:size], left[:, :size] * values[:size], norm=float(values.norm()), lost=float(values[size:].norm())
    )
