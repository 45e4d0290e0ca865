"""Every method against its definition, written once more in float64; the random ones by what they keep."""

import math

import numpy as np
import pytest
import torch

from sparse_ft.merging.methods import MERGE_METHODS

SHAPE = (6, 10)
WEIGHTS = [0.5, 0.3, 0.2]
RANDOM = [name for name, row in MERGE_METHODS.items() if "seed" in row.heeds]
EXACT = [name for name in MERGE_METHODS if name not in RANDOM]


def deltas(number=3, seed=0, shape=SHAPE):
    return torch.randn((number, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def merged(method, given, weights, density=0.5, seed=1):
    known = {
        "weights": torch.tensor(weights, dtype=torch.float64),
        "density": density,
        "generator": torch.Generator().manual_seed(seed),
    }
    row = MERGE_METHODS[method]
    heeded = {"generator" if name == "seed" else name for name in row.heeds}
    return row.function(given, **{name: value for name, value in known.items() if name in heeded})


# The definitions, in numpy


def largest(delta, share, skipped=0):
    """Zero all entries but the ``share`` that follow the ``skipped`` largest, one entry at a time."""
    order = sorted(np.ndindex(delta.shape), key=lambda index: -abs(delta[index]))
    out = np.zeros_like(delta)
    for index in order[skipped : skipped + round(share * delta.size)]:
        out[index] = delta[index]
    return out


def elect(parts, weights):
    out = np.zeros(parts[0].shape)
    for index in np.ndindex(out.shape):
        mass = sum(weight * part[index] for weight, part in zip(weights, parts, strict=True))
        sign = 1 if mass >= 0 else -1
        agreeing = [(w, p[index]) for w, p in zip(weights, parts, strict=True) if w * p[index] * sign > 0]
        if agreeing:
            out[index] = sum(w * value for w, value in agreeing) / sum(abs(w) for w, _ in agreeing)
    return out


def added(parts, weights):
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def arc(parts, weights):
    first, second = parts
    share = weights[1] / sum(weights)
    angle = math.acos((first * second).sum() / math.sqrt((first**2).sum() * (second**2).sum()))
    return (math.sin((1 - share) * angle) * first + math.sin(share * angle) * second) / math.sin(angle)


def stock(parts, _):
    cosines = [
        (one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum())
        for index, one in enumerate(parts)
        for two in parts[index + 1 :]
    ]
    cosine, number = float(np.mean(cosines)), len(parts)
    return number * cosine / (1 + (number - 1) * cosine) * np.mean(parts, axis=0)


DEFINITIONS = {
    "linear": lambda parts, weights, _: added(parts, np.array(weights) / sum(weights)),
    "task_arithmetic": lambda parts, weights, _: added(parts, weights),
    "ties": lambda parts, weights, density: elect([largest(part, density) for part in parts], weights),
    "breadcrumbs": lambda parts, weights, density: added(
        [largest(part, density, skipped=int(0.01 * part.size)) for part in parts], weights
    ),
    "magnitude_prune": lambda parts, weights, density: added([largest(part, density) for part in parts], weights),
    "slerp": lambda parts, weights, _: arc(parts, weights),
    "model_stock": lambda parts, weights, _: stock(parts, weights),
    "cat": lambda parts, weights, _: added(parts, weights),
    "svd": lambda parts, weights, _: added(parts, weights),
}


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("method", EXACT)
def test_a_method_is_what_its_paper_defines(method, density):
    number = MERGE_METHODS[method].most or 3
    given = deltas(number, shape=(20, 15)) + 0.3  # with cosines above 0, for model_stock
    weights = WEIGHTS[:number]
    if method == "breadcrumbs" and density > 0.9:
        expected = added(given.numpy(), weights)  # nothing may go
    else:
        expected = DEFINITIONS[method](given.numpy(), weights, density)
    assert np.abs(merged(method, given, weights, density).numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_an_expert_merged_with_itself_is_itself(method):
    given = deltas(1).repeat(2, 1, 1)
    assert torch.allclose(merged(method, given, [0.5, 0.5], density=1.0), given[0], atol=1e-12)


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_zeros_stay_zeros_and_nothing_becomes_nan(method):
    given = torch.zeros(2, *SHAPE, dtype=torch.float64)
    assert not merged(method, given, [0.5, 0.5]).any()
    given[0] = deltas(1)[0]
    assert torch.isfinite(merged(method, given, [0.5, 0.5])).all()


# Slerp and model stock at their edges


def test_slerp_keeps_the_norm_between_deltas_of_one_norm_and_goes_straight_between_parallel_ones():
    given = deltas(2)
    given = given / given.flatten(1).norm(dim=1).view(-1, 1, 1)
    assert merged("slerp", given, [0.4, 0.6]).norm().item() == pytest.approx(1.0)
    parallel = torch.stack([given[0], 3 * given[0]])
    assert torch.allclose(merged("slerp", parallel, [0.5, 0.5]), 2 * given[0])
    opposite = torch.stack([given[0], -given[0]])
    assert torch.allclose(merged("slerp", opposite, [0.75, 0.25]), given[0] / 2)


def test_model_stock_leaves_nothing_of_deltas_that_disagree():
    given = deltas(1)
    assert not merged("model_stock", torch.cat([given, -given]), []).any()


# The random methods


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_gives_the_same_again_and_another_gives_another(method):
    given = deltas()
    assert torch.equal(merged(method, given, WEIGHTS, seed=3), merged(method, given, WEIGHTS, seed=3))
    assert not torch.equal(merged(method, given, WEIGHTS, seed=3), merged(method, given, WEIGHTS, seed=4))


@pytest.mark.parametrize("density", [0.2, 0.8])
@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_of_a_single_delta_the_density_stays_and_the_expected_value_too(method, density):
    given = deltas(1, shape=(400, 500))
    found = merged(method, given, [1.0], density=density)
    if method == "dare":
        kept = found != 0
        assert torch.allclose(found[kept], given[0][kept] / density)
        assert float(kept.double().mean()) == pytest.approx(density, abs=0.005)
    # What is kept is scaled up by what was dropped: sums over many entries keep their size.
    assert float(found.abs().sum()) == pytest.approx(float(given.abs().sum()), rel=0.02)
    assert float(found.sum()) == pytest.approx(float(given.sum()), abs=6 * math.sqrt(given.numel() / density))


def test_the_expected_value_of_dare_is_the_weighted_sum():
    given = deltas()
    runs = torch.stack([merged("dare", given, WEIGHTS, seed=seed) for seed in range(1000)])
    expected = added(given.numpy(), WEIGHTS)
    assert np.abs((runs.mean(0).numpy() - expected) / (runs.std(0).numpy() / math.sqrt(len(runs)))).max() < 5


@pytest.mark.parametrize("density", [0.1, 0.95])
def test_della_keeps_large_entries_of_a_row_more_often_and_divides_each_by_its_chance(density):
    window = min(0.15, density / 2, 1 - density)
    row = torch.arange(1.0, 11.0, dtype=torch.float64)
    given = row.repeat(20000, 1).unsqueeze(0)
    found = merged("della", given, [1.0], density=density)
    chances = density - window + 2 * window * torch.arange(10, dtype=torch.float64) / 9
    assert torch.allclose((found != 0).double().mean(0), chances, atol=0.015)
    largest_seen = found.max(0).values
    assert torch.allclose(largest_seen, row / chances)


def test_dare_ties_elects_among_what_is_left():
    given = torch.stack([torch.full(SHAPE, 2.0), torch.full(SHAPE, -1.0)]).double()
    found = merged("dare_ties", given, [0.5, 0.5], density=0.5)
    assert set(found.flatten().tolist()) == {4.0, -2.0, 0.0}  # the first wherever it stayed, else the second
