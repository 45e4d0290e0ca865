"""A merge equals the sum of the deltas when the rank allows, and tells the reconstruction error when it does not."""

import pytest
import torch
from toy_checkpoints import HEADS, saved

from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.merging.merge import merge

WEIGHTS = {"mood": 1.0, "about": -0.5, "names": 2.0}


def dense(expert):
    """scale * B A of every layer, in float64."""
    return {
        module: expert.alpha / len(lora_a) * lora_b.double() @ lora_a.double()
        for module, (lora_a, lora_b) in expert.deltas.items()
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
def test_a_merge_is_the_sum_of_the_deltas(tmp_path, make_model, family):
    path = saved(tmp_path / "first", make_model, family)
    experts = load_checkpoint(path).model.experts
    expected = {}
    for name in HEADS:
        for module, delta in dense(experts.get(name)).items():
            expected[module] = expected.get(module, 0) + WEIGHTS[name] * delta
    options = {"method": "task_arithmetic", "weights": list(WEIGHTS.values())}
    exact = merge([path], output=tmp_path / "exact", **options)
    merged = dense(load_checkpoint(exact.path).model.experts.get("merged"))
    assert merged.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(merged[module], delta, atol=1e-5, rtol=1e-4)
    assert exact.error < 1e-5
    cut = merge([path], output=tmp_path / "cut", rank=3, **options)
    merged = dense(load_checkpoint(cut.path).model.experts.get("merged"))
    missed = sum((merged[module] - delta).square().sum() for module, delta in expected.items())
    norm = sum(delta.square().sum() for delta in expected.values())
    assert cut.error == pytest.approx(float((missed / norm).sqrt()), rel=1e-3)
    assert cut.error > 0.01
