"""The sparse path equals the dense reference: every layer is the sum over its experts in float64."""

from dataclasses import replace

import pytest
import torch
from toy_checkpoints import add_random_expert
from toy_models import SENTENCES, THREE_HEADS, assert_same_logits, one_by_one, rows_of, run_rows, three_tasks

from sparse_ft.backbone.batching import collate
from sparse_ft.experts.gates import TokenGate
from sparse_ft.experts.selection import Selection


def by_loops(model, module, x, weights):
    """y = W x + b + sum over e of w_e s_e B_e A_e x, in float64, expert after expert."""
    frozen = model.experts.layers[module].frozen
    y = x.double() @ frozen.weight.double().T + frozen.bias.double()
    for index, name in enumerate(model.experts.names):
        expert = model.experts.get(name)
        if module in expert.deltas:
            lora_a, lora_b = (matrix.double() for matrix in expert.deltas[module])
            scale = expert.alpha / len(lora_a)
            y = y + weights[..., index : index + 1].double() * scale * (x.double() @ lora_a.T @ lora_b.T)
    return y


@pytest.fixture
def gated(make_model):
    """Three tasks mixed by token; two of them share an expert, too."""
    model = three_tasks(make_model, "bert")
    add_random_expert(model, "common", rank=3, seed=2)
    add_random_expert(model, "more", rank=5, first_block=1, seed=3)
    for name, slot in model.tasks.items():
        model.tasks[name] = replace(slot, joint=True, shared=None if name == "topic" else "common")
    return model


@torch.no_grad()
def mix_by_token(model, *, shortlist, top_k=2):
    """Give the model a gate over its experts in another order, and sure of itself."""
    names = [name for name in reversed(model.experts.names) if name != "common"]
    gate = TokenGate(names, 32, blocks=[0, 1, 2], selection=Selection(top_k=top_k), shortlist=shortlist)
    for linear in gate.linears:
        linear.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    model.gate = gate.eval()


@pytest.mark.parametrize("shortlist", [None, 3, 2])
@torch.no_grad()
def test_every_layer_is_the_sum_over_its_experts_in_float64(gated, shortlist):
    mix_by_token(gated, shortlist=shortlist)
    texts = [[f"{text} {number}" for text in SENTENCES] for number in range(3)]  # no two rows share blocks
    rows = [row for task, own in zip(THREE_HEADS, texts, strict=True) for row in rows_of(gated, task, own)]
    batch, passed, seen = collate(rows, pad_id=gated.backbone.pad_id), {}, {}
    handles = [
        layer.register_forward_hook(
            lambda _, args, y, module=module: passed.update({module: (args[0].clone(), y.clone())})
        )
        for module, layer in gated.experts.layers.items()
    ]
    gated(batch, gate=gated.gate, block_routings=seen)
    for handle in handles:
        handle.remove()
    assert passed.keys() == gated.experts.layers.keys()
    common, shares = gated.experts.index("common"), torch.ones(len(rows))
    for part in batch.tasks:
        shares[part.start : part.stop] = part.task != "topic"
    for module, (x, y) in passed.items():
        weights = seen[gated.backbone.block_of(module)].dense_weights(len(gated.experts.names)).clone()
        assert ((weights > 0).sum(-1) == 2).all()
        weights[..., common] = shares.unsqueeze(1)
        torch.testing.assert_close(y.double(), by_loops(gated, module, x, weights), atol=1e-4, rtol=1e-4)
    block = seen[1].dense_weights(len(gated.experts.names))
    if shortlist != 2:  # of 2, every token of a text takes both
        assert len({tuple(token.nonzero().flatten().tolist()) for token in block.flatten(0, 1)}) > 1


@pytest.mark.parametrize(("family", "shortlist"), [("bert", None), ("bert", 3), ("gpt2", 3)])
def test_mixed_rows_answer_the_same_in_any_company(make_model, family, shortlist):
    model = three_tasks(make_model, family)
    for name, slot in model.tasks.items():
        model.tasks[name] = replace(slot, joint=True)
    add_random_expert(model, "more", rank=5, seed=3)
    mix_by_token(model, shortlist=shortlist)
    alone = {task: one_by_one(model, task) for task in THREE_HEADS}
    with torch.no_grad():
        together = run_rows(model, [row for task in THREE_HEADS for row in rows_of(model, task)])
    for task in THREE_HEADS:
        assert_same_logits(together[task], alone[task])
        assert alone[task].std(0).min() > 1e-3


@torch.no_grad()
def test_the_gate_of_a_model_decides_for_mixed_tasks_and_not_for_others(gated):
    mix_by_token(gated, shortlist=None)
    rows = rows_of(gated, "mood")
    mixed = run_rows(gated, rows)["mood"]
    asked = gated(collate(rows, pad_id=gated.backbone.pad_id), gate=gated.gate)["mood"]
    assert torch.equal(mixed, asked)
    gated.tasks["mood"] = replace(gated.tasks["mood"], joint=False, shared=None)
    assert not torch.allclose(run_rows(gated, rows)["mood"], mixed, atol=1e-3)
    with pytest.raises(ValueError, match="'names' must be routed first"):
        run_rows(gated, rows + rows_of(gated, "names"))
