"""Merge methods: the deltas of several experts on one layer become one delta.

A delta is alpha / r * B A, the whole change of a weight: A and B are never merged apart, which would add cross terms
B1 A2. Shapes: N experts, O outputs, I inputs. Every method takes ``deltas`` [N, O, I] and returns [O, I], in float64.
``weights`` [N] may have any sign in methods that add up; in others only their proportions count, and none is negative.
``density``, above 0 to 1, is the share of each delta's entries that stay. ``generator`` draws the entries that go.

The definitions are those of the papers; where a paper leaves something open, mergekit's answer is taken
(https://github.com/arcee-ai/mergekit/tree/a6e402884ba9bc30da7f23e8304a35f19485de95/mergekit/merge_methods), and said.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_OUTLIERS = 0.01
"""Share of the largest entries that breadcrumbs drops."""
_WINDOW = 0.15
"""Distance of DELLA's lowest and highest probability to stay from the density."""
_PARALLEL = 1e-6
"""Sine of the angle below which two deltas are interpolated on a straight line."""


def linear(deltas: Tensor, *, weights: Tensor) -> Tensor:
    """Average the deltas with their weights."""
    return task_arithmetic(deltas, weights=weights / weights.sum())


def task_arithmetic(deltas: Tensor, *, weights: Tensor) -> Tensor:
    """Add up the deltas times their weights; a negative weight takes a task out.

    Ilharco et al. 2022, https://arxiv.org/abs/2212.04089.
    """
    return torch.einsum("n,noi->oi", weights, deltas)


def ties(deltas: Tensor, *, weights: Tensor, density: float) -> Tensor:
    """Trim the deltas, elect a sign for each entry, and average the entries of that sign.

    Yadav et al. 2023, https://arxiv.org/abs/2306.01708. The entries of a layer are trimmed among themselves, and a tie
    of signs is positive, as in mergekit.
    """
    return _agreeing(_trimmed(deltas, density), weights)


def dare(deltas: Tensor, *, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random, scale up the others to keep the expected value, and add up.

    Yu et al. 2023, https://arxiv.org/abs/2311.03099; scaled by 1 / density as there. (mergekit scales to the same L1
    norm.)
    """
    return task_arithmetic(_kept_at_random(deltas, torch.full_like(deltas, density), generator), weights=weights)


def dare_ties(deltas: Tensor, *, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random as ``dare`` does in place of trimming, then elect and average as ``ties`` does."""
    return _agreeing(_kept_at_random(deltas, torch.full_like(deltas, density), generator), weights)


def della(deltas: Tensor, *, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random, the small ones of a row sooner, scale up the others, then elect and average as ``ties``.

    Deep et al. 2024, https://arxiv.org/abs/2406.11617. The probability to stay rises evenly with the rank of an entry's
    magnitude in its row, from density - window to density + window. The window is 0.15 as in mergekit, or less where a
    probability would leave 0 to 1. Each entry that stays is divided by its probability.
    """
    window = min(_WINDOW, density / 2, 1 - density)
    ranks = deltas.abs().argsort(dim=-1).argsort(dim=-1).double()  # [N, O, I], 0 for the smallest of a row
    steps = ranks / max(1, deltas.shape[-1] - 1)
    return _agreeing(_kept_at_random(deltas, density - window + 2 * window * steps, generator), weights)


def breadcrumbs(deltas: Tensor, *, weights: Tensor, density: float) -> Tensor:
    """Drop the largest 1 % of each delta's entries, and of the smallest as many as the density says; add up.

    Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795. A density above 99 % drops fewer of the largest, as in
    mergekit.
    """
    size = deltas[0].numel()
    kept = _number(density, size)
    outliers = min(int(_OUTLIERS * size), size - kept)
    order = deltas.abs().flatten(1).argsort(dim=1, descending=True, stable=True)
    return task_arithmetic(_only(deltas, order[:, outliers : outliers + kept]), weights=weights)


def magnitude_prune(deltas: Tensor, *, weights: Tensor, density: float) -> Tensor:
    """Keep the largest entries of each delta, and add up: ``ties`` without the election of signs.

    PEFT's magnitude_prune, on deltas instead of factors:
    https://github.com/huggingface/peft/blob/v0.17.0/src/peft/utils/merge_utils.py.
    """
    return task_arithmetic(_trimmed(deltas, density), weights=weights)


def slerp(deltas: Tensor, *, weights: Tensor) -> Tensor:
    """Go from the first of two deltas to the second along the arc between them.

    Shoemake 1985, https://doi.org/10.1145/325165.325242. Each layer has its own angle; parallel deltas, opposite ones
    and zeros are interpolated on a straight line.
    """
    first, second = deltas.flatten(1)
    share = weights[1] / weights.sum()
    product = first.norm() * second.norm()
    cosine = (first @ second / product).clamp(-1, 1) if product > 0 else torch.ones_like(product)
    angle = torch.arccos(cosine)
    if torch.sin(angle) < _PARALLEL:
        return linear(deltas, weights=weights)
    turns = torch.stack([torch.sin((1 - share) * angle), torch.sin(share * angle)]) / torch.sin(angle)
    return task_arithmetic(deltas, weights=turns)


def model_stock(deltas: Tensor) -> Tensor:
    """Shrink the mean of the deltas by how little they agree.

    Jang et al. 2024, https://arxiv.org/abs/2403.19522: t = N cos / (1 + (N - 1) cos), with a layer's mean cosine over
    all pairs as in mergekit. Deltas that disagree on average (cos < 0) leave nothing of the layer.
    """
    number = len(deltas)
    flat = deltas.flatten(1)
    directions = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    cosines = directions @ directions.t()
    cosine = ((cosines.sum() - cosines.trace()) / (number * (number - 1))).clamp(0, 1)
    return number * cosine / (1 + (number - 1) * cosine) * deltas.mean(0)


def _number(density: float, size: int) -> int:
    """Return how many of ``size`` entries stay: at least one."""
    return max(1, round(density * size))


def _only(deltas: Tensor, indices: Tensor) -> Tensor:
    """Set all entries to zero except those at ``indices``, [N, kept] in the flattened deltas."""
    flat = deltas.flatten(1)
    return torch.zeros_like(flat).scatter(1, indices, flat.gather(1, indices)).view_as(deltas)


def _trimmed(deltas: Tensor, density: float) -> Tensor:
    """Keep the largest entries of each delta."""
    magnitudes = deltas.abs().flatten(1)
    return _only(deltas, magnitudes.topk(_number(density, magnitudes.shape[1]), dim=1).indices)


def _kept_at_random(deltas: Tensor, probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Keep each entry with its probability, and divide by that probability, which keeps the expected value."""
    return torch.where(
        torch.rand(deltas.shape, generator=generator, dtype=deltas.dtype) < probabilities, deltas / probabilities, 0.0
    )


def _agreeing(deltas: Tensor, weights: Tensor) -> Tensor:
    """Average, entry by entry, the weighted deltas that have the sign of their sum; zeros do not count."""
    weighted = deltas * weights.view(-1, 1, 1)
    elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == elected
    shares = (agrees * weights.abs().view(-1, 1, 1)).sum(0)
    return (weighted * agrees).sum(0) / torch.where(shares > 0, shares, 1.0)


@dataclass(frozen=True)
class MergeMethod:
    """A method that makes one expert of several."""

    function: Callable[..., Tensor]
    """Takes the deltas, and by name those of ``weights``, ``density`` and ``generator`` that it heeds."""
    heeds: tuple[str, ...]
    """Settings that make a difference; ``seed`` reaches the function as ``generator``."""
    source: str
    averages: bool = False
    """Whether only the proportions of the weights count."""
    sums: bool = False
    """Whether the merged delta is the weighted sum of the deltas, which can be computed on their factors."""
    most: int | None = None
    """Largest number of experts."""


_RANK = ("rank", "energy")
_SUM = ("weights", *_RANK)
_SPARSE = ("weights", "density", *_RANK)
_RANDOM = ("weights", "density", "seed", *_RANK)
_EIGENVALUES = "https://doi.org/10.1007/BF02288367"  # Eckart and Young 1936

MERGE_METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(linear, _SUM, "https://arxiv.org/abs/2203.05482", averages=True, sums=True),
    "task_arithmetic": MergeMethod(task_arithmetic, _SUM, "https://arxiv.org/abs/2212.04089", sums=True),
    "ties": MergeMethod(ties, _SPARSE, "https://arxiv.org/abs/2306.01708", averages=True),
    "dare": MergeMethod(dare, _RANDOM, "https://arxiv.org/abs/2311.03099"),
    "dare_ties": MergeMethod(dare_ties, _RANDOM, "https://arxiv.org/abs/2311.03099", averages=True),
    "della": MergeMethod(della, _RANDOM, "https://arxiv.org/abs/2406.11617", averages=True),
    "breadcrumbs": MergeMethod(breadcrumbs, _SPARSE, "https://arxiv.org/abs/2312.06795"),
    "magnitude_prune": MergeMethod(magnitude_prune, _SPARSE, "https://arxiv.org/abs/1506.02626"),
    "slerp": MergeMethod(slerp, _SUM, "https://doi.org/10.1145/325165.325242", averages=True, most=2),
    "model_stock": MergeMethod(model_stock, _RANK, "https://arxiv.org/abs/2403.19522", averages=True),
    "cat": MergeMethod(task_arithmetic, ("weights",), "https://arxiv.org/abs/2212.04089", sums=True),
    "svd": MergeMethod(task_arithmetic, _SUM, _EIGENVALUES, sums=True),
}
"""The methods that make one expert of several; ``stack``, which keeps all experts, is no arithmetic."""
