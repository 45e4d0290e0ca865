"""Several experts merged into one, layer by layer: dense deltas become one delta, which is factored again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_ft.errors import ConfigError
from sparse_ft.experts.low_rank import Truncation, factor, factor_product
from sparse_ft.experts.named_experts import Expert, named_generator
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.merging.settings import MergeSettings
from sparse_ft.progress import progress_bar


@dataclass(frozen=True)
class MergedExpert:
    """An expert made of several, and what its rank lost: relative Frobenius errors, 0 to 1."""

    expert: Expert
    error: float
    """Error of all deltas together."""
    errors: dict[str, float]
    """Error of each delta, by module."""


def merge_experts(experts: Sequence[Expert], settings: MergeSettings) -> MergedExpert:
    """Merge experts into one, whose alpha is its largest rank.

    Ranks, alphas and layers may differ. An expert without a delta in a layer counts as zeros there. A layer in which
    the deltas cancel has no delta in the merged expert.

    Args:
        experts: On one backbone.
        settings: With a weight for each expert; see ``MergeSettings.for_experts``.

    Raises:
        ConfigError: If the deltas cancel in every layer.
    """
    factors, norms, losses = {}, {}, {}
    modules = dict.fromkeys(module for expert in experts for module in expert.deltas)
    with progress_bar("merging", total=len(modules), unit="layer") as bar:
        for module in modules:
            merged = (_summed if MERGE_METHODS[settings.method].sums else _computed)(experts, module, settings)
            if merged.norm:
                factors[module] = merged.lora_a.float(), merged.lora_b.float()
                norms[module], losses[module] = merged.norm, merged.lost
            bar.update()
    if not factors:
        raise ConfigError("Nothing is left of the experts: their deltas cancel in every layer. Choose other weights.")
    alpha = max(len(lora_a) for lora_a, _ in factors.values())
    # B A is scaled by alpha / rank, and the rank may differ from layer to layer.
    deltas = {module: (lora_a, lora_b * (len(lora_a) / alpha)) for module, (lora_a, lora_b) in factors.items()}
    return MergedExpert(
        Expert(settings.name, float(alpha), deltas, *_merged_shapes(experts, settings)),
        math.hypot(*losses.values()) / math.hypot(*norms.values()),
        {module: losses[module] / norms[module] for module in deltas},
    )


def _summed(experts: Sequence[Expert], module: str, settings: MergeSettings) -> Truncation:
    """Sum the deltas of one layer on their factors: all A stacked, beside all B times their weights."""
    total = sum(settings.weights) if MERGE_METHODS[settings.method].averages else 1.0
    parts = [
        (lora_a.double(), lora_b.double() * (_scale(expert, module) * weight / total))
        for expert, weight in zip(experts, settings.weights, strict=True)
        for lora_a, lora_b in filter(None, [expert.deltas.get(module)])
    ]
    lora_a, lora_b = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts], dim=1)
    merged = factor_product(lora_a, lora_b, rank=settings.rank, energy=settings.energy)
    return replace(merged, lora_a=lora_a, lora_b=lora_b) if settings.method == "cat" else merged


def _computed(experts: Sequence[Expert], module: str, settings: MergeSettings) -> Truncation:
    """Apply the method to the dense deltas of one layer, and cut the merged delta to the rank of the settings."""
    method = MERGE_METHODS[settings.method]
    arguments = {
        "weights": torch.tensor(settings.weights, dtype=torch.float64),
        "density": settings.density,
        "generator": named_generator(settings.seed, f"merge/{module}"),
    }
    heeded = {"generator" if name == "seed" else name for name in method.heeds}
    merged = method.function(
        _dense(experts, module), **{name: value for name, value in arguments.items() if name in heeded}
    )
    rank = settings.rank
    if rank is None and settings.energy is None:
        rank = sum(expert.ranks.get(module, 0) for expert in experts)
    return factor(merged, rank=rank, energy=settings.energy)


def _dense(experts: Sequence[Expert], module: str) -> Tensor:
    """Return the deltas of one layer, [N, O, I] float64, with zeros for experts that have none there."""
    pairs = [expert.deltas.get(module) for expert in experts]
    shape = next((lora_b.shape[0], lora_a.shape[1]) for lora_a, lora_b in filter(None, pairs))
    return torch.stack(
        [
            torch.zeros(shape, dtype=torch.float64)
            if pair is None
            else _scale(expert, module) * (pair[1].double() @ pair[0].double())
            for expert, pair in zip(experts, pairs, strict=True)
        ]
    )


def _scale(expert: Expert, module: str) -> float:
    return expert.alpha / expert.ranks[module]


def _merged_shapes(experts: Sequence[Expert], settings: MergeSettings) -> tuple[Tensor | None, int | None]:
    """Merge the word shapes of the experts that have some, with the same weights, averaged if the method averages.

    Word shapes are vectors for nine kinds of words, not weights of a layer, so nothing is trimmed or cut. Experts
    without word shapes never read words and do not count.

    Returns:
        The vectors, [shapes, hidden], and the block before which they are added; None and None if no expert has any.

    Raises:
        ConfigError: If the experts add theirs before different blocks.
    """
    having = [
        (expert, weight)
        for expert, weight in zip(experts, settings.weights, strict=True)
        if expert.word_shapes is not None and weight
    ]
    if not having:
        return None, None
    (first, _), *others = having
    for other, _ in others:
        if other.shapes_block != first.shapes_block:
            raise ConfigError(
                f"Experts {first.name!r} and {other.name!r} see how words are written in different blocks, "
                f"{first.shapes_block} and {other.shapes_block}. Merge taggers that were trained with the same "
                "experts.first_block."
            )
    tables = torch.stack([expert.word_shapes.double() for expert, _ in having if expert.word_shapes is not None])
    weights = torch.tensor([weight for _, weight in having], dtype=torch.float64)
    if MERGE_METHODS[settings.method].averages:
        weights = weights / weights.sum()
    return torch.einsum("n,nsh->sh", weights, tables).float(), first.shapes_block
