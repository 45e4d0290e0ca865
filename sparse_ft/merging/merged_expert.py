"""Several experts merged to one, layer by layer: of whole deltas, which then are factors of a rank again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.named_experts import Expert, named_generator
from sparse_ft.merging.low_rank import Truncation, factor, factor_product
from sparse_ft.merging.methods import MERGE_METHODS

DENSITY = 0.5
"""Where none is given."""


@dataclass(frozen=True)
class MergeSettings:
    """How experts are merged; ``merge_settings`` checks it."""

    method: str
    weights: tuple[float, ...]
    """One an expert."""
    density: float = DENSITY
    rank: int | None = None
    energy: float | None = None
    seed: int = 13


@dataclass(frozen=True)
class MergedExpert:
    """An expert made of several, and what its rank lost: relative Frobenius errors, 0 to 1."""

    expert: Expert
    error: float
    """Of all deltas together."""
    errors: dict[str, float]
    """Of each, by module."""


def merge_settings(
    method: str,
    *,
    num_experts: int,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 13,
) -> MergeSettings:
    """Check how experts shall be merged, and fill in what is not given.

    Args:
        method: A name in MERGE_METHODS.
        num_experts: To be merged.
        weights: One an expert; None: all equal, with a sum of 1.
        density: Share of the entries that a sparse method keeps, above 0 to 1; None: 0.5.
        rank: Of the outcome, at most. None, without ``energy``: in each layer the sum of the experts' ranks, at which a
            weighted sum is exact and the outcome not larger than the experts together.
        energy: Keep so much of each delta's squared norm in place of a fixed rank, above 0 to 1.
        seed: Of what is dropped at random.

    Raises:
        ConfigError: If a value is out of range, or the method makes nothing of it.
    """
    if method not in MERGE_METHODS:
        raise ConfigError(unknown_name("merge method", method, ("stack", *MERGE_METHODS)))
    row = MERGE_METHODS[method]
    if row.most is not None and num_experts > row.most:
        raise ConfigError(f"{method} merges {row.most} experts, and there are {num_experts}. Name two of them.")
    given = {"weights": weights, "density": density, "rank": rank, "energy": energy}
    for option, value in given.items():
        needed = "rank" if option == "energy" else option
        if value is not None and needed not in row.heeds:
            able = [name for name, other in MERGE_METHODS.items() if needed in other.heeds]
            raise ConfigError(f"{method} has no use for --{option}. Leave it out, or choose {', '.join(able)}.")
    if rank is not None and energy is not None:
        raise ConfigError("--rank and --energy are both given. Choose one.")
    if method == "svd" and rank is None and energy is None:
        raise ConfigError("svd cuts to a rank or to a share of the squared norm: give --rank N or --energy 0.99.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"--density is {density:g}. Expected a share above 0, up to 1.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}. Expected a share above 0, up to 1.")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}. Expected 1 or more.")
    shares = tuple(weights) if weights is not None else (1 / num_experts,) * num_experts
    _check_weights(shares, method=method, num_experts=num_experts)
    return MergeSettings(method, shares, DENSITY if density is None else density, rank, energy, seed)


def _check_weights(weights: tuple[float, ...], *, method: str, num_experts: int) -> None:
    shown = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != num_experts:
        raise ConfigError(
            f"--weights {shown} has {len(weights)} numbers for {num_experts} experts. Give one each, in their order."
        )
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ConfigError(f"--weights {shown}: expected finite numbers that are not all zero.")
    if not MERGE_METHODS[method].averages:
        return
    if min(weights) < 0:
        able = [name for name, row in MERGE_METHODS.items() if "weights" in row.heeds and not row.averages]
        raise ConfigError(
            f"--weights {shown}: {method} averages, so no weight may be negative. These add up: {', '.join(able)}."
        )


def merge_experts(experts: Sequence[Expert], settings: MergeSettings, *, name: str) -> MergedExpert:
    """Merge experts to one.

    Ranks, alphas and layers may differ; an expert that leaves a layer alone has a delta of zeros there. Layers in which
    nothing is left are left alone by the outcome, too.

    Args:
        experts: On one backbone.
        settings: Of ``merge_settings``, with a weight for each.
        name: Of the outcome. Its alpha is its largest rank.

    Raises:
        ConfigError: If nothing is left in any layer.
    """
    factors, norms, losses = {}, {}, {}
    for module in dict.fromkeys(module for expert in experts for module in expert.deltas):
        merged = (_summed if MERGE_METHODS[settings.method].sums else _computed)(experts, module, settings)
        if merged.norm:
            factors[module] = merged.lora_a.float(), merged.lora_b.float()
            norms[module], losses[module] = merged.norm, merged.lost
    if not factors:
        raise ConfigError("Nothing is left of the experts: their deltas cancel in every layer. Choose other weights.")
    alpha = max(len(lora_a) for lora_a, _ in factors.values())
    # B A is scaled by alpha / rank, and the rank may differ from layer to layer.
    deltas = {module: (lora_a, lora_b * (len(lora_a) / alpha)) for module, (lora_a, lora_b) in factors.items()}
    return MergedExpert(
        Expert(name, float(alpha), deltas, *_merged_shapes(experts, settings)),
        math.hypot(*losses.values()) / math.hypot(*norms.values()),
        {module: losses[module] / norms[module] for module in deltas},
    )


def _summed(experts: Sequence[Expert], module: str, settings: MergeSettings) -> Truncation:
    """Add up the deltas of one layer by their factors: all A above each other, all B times their weights in a row."""
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
    """Apply the method to the dense deltas of one layer, and cut the outcome as the settings say."""
    pairs = [expert.deltas.get(module) for expert in experts]
    shape = next((lora_b.shape[0], lora_a.shape[1]) for lora_a, lora_b in filter(None, pairs))
    deltas = torch.stack(
        [
            torch.zeros(shape, dtype=torch.float64)
            if pair is None
            else _scale(expert, module) * (pair[1].double() @ pair[0].double())
            for expert, pair in zip(experts, pairs, strict=True)
        ]
    )
    known = {
        "weights": torch.tensor(settings.weights, dtype=torch.float64),
        "density": settings.density,
        "generator": named_generator(settings.seed, f"merge/{module}"),
    }
    method = MERGE_METHODS[settings.method]
    merged = method.function(deltas, **{name: value for name, value in known.items() if name in method.heeds})
    rank = settings.rank
    if rank is None and settings.energy is None:
        rank = sum(expert.ranks.get(module, 0) for expert in experts)
    return factor(merged, rank=rank, energy=settings.energy)


def _scale(expert: Expert, module: str) -> float:
    return expert.alpha / expert.ranks[module]


def _merged_shapes(experts: Sequence[Expert], settings: MergeSettings) -> tuple[Tensor | None, int | None]:
    """Merge the word shapes of the experts that have some, by the same weights: averaged if the method averages.

    They are vectors of nine kinds of words, not weights of a layer, so there is nothing to trim or to cut. Experts
    without any never see a text of words and have no say.

    Returns:
        The vectors, and the block before which they are added.

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
