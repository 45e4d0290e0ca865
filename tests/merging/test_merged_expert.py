"""One expert of several, against dense float64 deltas and against PEFT's merges of dense deltas."""

import math

import pytest
import torch
from toy_checkpoints import saved

from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.experts.low_rank import factor, factor_product
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.merged_expert import merge_experts
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.merging.settings import merge_settings

LAYERS = {"both": (24, 30), "first": (16, 12), "second": (12, 16)}


def dense(expert):
    return {
        module: expert.alpha / len(lora_a) * lora_b.double() @ lora_a.double()
        for module, (lora_a, lora_b) in expert.deltas.items()
    }


def expert(name, modules, *, rank, alpha, seed, shapes=False):
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        module: (
            torch.randn(rank, LAYERS[module][1], generator=generator),
            torch.randn(LAYERS[module][0], rank, generator=generator),
        )
        for module in modules
    }
    return Expert(name, alpha, deltas, torch.randn(9, 8, generator=generator) if shapes else None)


@pytest.fixture
def pair():
    """Two experts that differ in rank, alpha and layers."""
    return [
        expert("one", ["both", "first"], rank=2, alpha=8.0, seed=1),
        expert("two", ["both", "second"], rank=3, alpha=2.0, seed=2),
    ]


def settings(method, number=2, **changes):
    if method == "svd" and not {"rank", "energy"} & set(changes):
        changes["energy"] = 1.0
    return merge_settings({"method": method, **changes}).for_experts(number)


def largest_difference(found, expected):
    return max(float((found[module] - expected[module]).abs().max()) for module in expected)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "cat", "svd", "slerp"])
def test_at_the_sum_of_the_ranks_the_outcome_is_the_sum_of_the_deltas(pair, method):
    weights = [0.3, 0.7]
    merged = merge_experts(pair, settings(method, weights=weights))
    one, two = dense(pair[0]), dense(pair[1])
    if method == "slerp":
        cosine = (one["both"] * two["both"]).sum() / one["both"].norm() / two["both"].norm()
        angle = math.acos(cosine)
        weights_of = {"both": [math.sin(weight * angle) / math.sin(angle) for weight in weights]}
    else:
        weights_of = {}
    expected = {
        module: sum(
            weight * part[module]
            for weight, part in zip(weights_of.get(module, weights), (one, two), strict=True)
            if module in part
        )
        for module in LAYERS
    }
    assert merged.expert.ranks == {"both": 5, "first": 2, "second": 3}
    assert largest_difference(dense(merged.expert), expected) < 1e-5 * max(map(float, (one["both"].norm(),)))
    assert merged.error < 1e-6
    assert max(merged.errors.values()) < 1e-6


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "magnitude_prune", "dare", "dare_ties", "della"])
def test_sparse_methods_need_all_ranks_and_say_what_fewer_lose(pair, method):
    uncut = merge_experts(pair, settings(method, energy=1.0))
    assert uncut.error < 1e-6
    assert uncut.expert.ranks["both"] == 24
    cut = merge_experts(pair, settings(method))
    assert cut.expert.ranks["both"] == 5
    for module, delta in dense(uncut.expert).items():
        lost = torch.linalg.svdvals(delta)[cut.expert.ranks[module] :].norm() / delta.norm()
        assert cut.errors[module] == pytest.approx(float(lost), abs=1e-6)
        assert float((dense(cut.expert)[module] - delta).norm() / delta.norm()) == pytest.approx(float(lost), abs=1e-6)
    norms = {module: float(delta.norm()) for module, delta in dense(uncut.expert).items()}
    together = math.hypot(*(cut.errors[module] * norm for module, norm in norms.items())) / math.hypot(*norms.values())
    assert cut.error == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_is_reached_by_the_lowest_rank_that_does(pair, energy):
    merged = merge_experts(pair, settings("svd", energy=energy))
    for module, delta in dense(merge_experts(pair, settings("cat")).expert).items():
        shares = torch.linalg.svdvals(delta).square()
        kept = (shares.cumsum(0) / shares.sum())[: merged.expert.ranks[module]]
        assert kept[-1] >= energy
        assert len(kept) == 1 or kept[-2] < energy


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_an_expert_merged_with_itself_comes_back_in_its_rank(pair, method):
    density = {"density": 1.0} if "density" in MERGE_METHODS[method].heeds else {}
    merged = merge_experts([pair[0], pair[0]], settings(method, **density))
    expected = dense(pair[0])
    assert largest_difference(dense(merged.expert), expected) < 1e-6 * float(expected["both"].norm())
    assert merged.expert.ranks == ({"both": 4, "first": 4} if method == "cat" else pair[0].ranks)


def test_the_order_of_layers_and_other_layers_do_not_change_what_is_drawn(pair):
    drawn = merge_experts(pair, settings("dare", seed=5)).expert.deltas["both"]
    alone = [Expert(part.name, part.alpha, {"both": part.deltas["both"]}) for part in pair]
    again = merge_experts(alone, settings("dare", seed=5)).expert
    assert torch.allclose(drawn[0], again.deltas["both"][0])


def test_word_shapes_are_merged_as_vectors_of_those_that_have_them(pair):
    tagger = expert("three", ["both"], rank=2, alpha=4.0, seed=3, shapes=True)
    other = expert("four", ["both"], rank=2, alpha=4.0, seed=4, shapes=True)
    three = merge_experts([*pair, tagger], settings("linear", 3)).expert
    assert torch.allclose(three.word_shapes, tagger.word_shapes)
    both = merge_experts([tagger, other], settings("ties", weights=[1, 3])).expert
    assert torch.allclose(both.word_shapes, tagger.word_shapes / 4 + 3 * other.word_shapes / 4)
    taken = merge_experts([tagger, other], settings("task_arithmetic", weights=[1, -0.5])).expert
    assert torch.allclose(taken.word_shapes, tagger.word_shapes - other.word_shapes / 2)
    assert merge_experts(pair, settings("linear")).expert.word_shapes is None


def test_deltas_that_cancel_are_refused(pair):
    with pytest.raises(ConfigError, match="Nothing is left of the experts: their deltas cancel in every layer"):
        merge_experts([pair[0], pair[0]], settings("task_arithmetic", weights=[1, -1]))


@pytest.mark.parametrize("cut", [{}, {"rank": 2}, {"energy": 0.9}])
@pytest.mark.parametrize("rank", [4, 12])  # below and above the width
def test_a_product_is_factored_as_its_dense_delta_is(cut, rank):
    generator = torch.Generator().manual_seed(rank)
    lora_a = torch.randn(rank, 7, dtype=torch.float64, generator=generator)
    lora_b = torch.randn(9, rank, dtype=torch.float64, generator=generator)
    found, dense_found = factor_product(lora_a, lora_b, **cut), factor(lora_b @ lora_a, **cut)
    assert found.lora_a.shape == dense_found.lora_a.shape
    assert torch.allclose(found.lora_b @ found.lora_a, dense_found.lora_b @ dense_found.lora_a, rtol=0, atol=1e-12)
    assert (found.norm, found.lost) == pytest.approx((dense_found.norm, dense_found.lost), abs=1e-12)
    cancelled = factor_product(torch.cat([lora_a, lora_a]), torch.cat([lora_b, -lora_b], dim=1), **cut)
    assert (len(cancelled.lora_a), cancelled.norm) == (0, 0.0)


# PEFT builds dense deltas for its svd types, so there the two agree; its other types mix A and B apart.
@pytest.mark.parametrize(("method", "combination", "extra"), [
    ("svd", "svd", {}),
    ("task_arithmetic", "svd", {}),
    ("magnitude_prune", "magnitude_prune_svd", {"density": 0.5}),
    ("ties", "ties_svd", {"density": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_as_peft_merges_whole_deltas(tmp_path, make_model, tiny_folder, family, method, combination, extra):
    from peft import PeftModel
    from transformers import AutoModel

    path = saved(tmp_path / "both", make_model, family)
    loaded = load_checkpoint(path).model
    names = ["mood", "about"]
    weights = [1.0, 1.0] if method == "ties" else [0.6, -0.4]  # with others, PEFT divides ties by a count
    peft = PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_folder(family)), path / "experts/mood", adapter_name="mood"
    )
    peft.load_adapter(path / "experts/about", adapter_name="about")
    peft.add_weighted_adapter(names, weights, "merged", combination_type=combination, svd_rank=6, **extra)
    experts = [loaded.experts.get(name) for name in names]
    merged = merge_experts(experts, settings(method, weights=weights, rank=6, **extra)).expert
    compared = 0
    for module, delta in dense(merged).items():
        layer = peft.base_model.model.get_submodule(module)
        if {"mood", "about"} <= set(layer.lora_A):  # PEFT gives the others the deltas of one
            theirs = layer.get_delta_weight("merged").double()
            theirs = theirs.T if getattr(layer, "fan_in_fan_out", False) else theirs
            assert torch.allclose(delta, theirs, atol=1e-6 + 1e-5 * float(theirs.abs().max())), module
            compared += 1
    assert compared > 6


def test_all_problems_of_settings_are_named_at_once():
    values = {"method": "linear", "density": 2, "rank": 0, "energy": 0.5, "budget": 9, "wieghts": [1]}
    with pytest.raises(ConfigError) as caught:
        merge_settings(values)
    for part in (
        "linear has no use for --density.",
        "--budget 9 means something with --search only.",
        "--rank and --energy are both given.",
        "density: Input should be less than or equal to 1 (got 2).",
        "rank: Input should be greater than or equal to 1 (got 0).",
        "Unknown key 'wieghts'. Did you mean 'weights'?",
    ):
        assert part in str(caught.value)
