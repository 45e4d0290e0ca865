"""Named experts over all layers of a backbone."""

import pytest
import torch
from toy_checkpoints import add_random_expert, all_logits, assert_bit_identical, batch_of, trainable_of

from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.experts.named_experts import Expert, named_generator

HEADS = {"mood": ("text", 3), "names": ("word", 5)}


# Families: linear and Conv1D, both directions of attention, and the one that is routed task by task.
@pytest.mark.parametrize(("family", "first_block", "rank", "targets", "grad"), [
    pytest.param("bert", 1, 4, None, False, id="the same layers and rank"),
    pytest.param("bert", 1, 16, None, True, id="a larger rank, in training"),
    pytest.param("bert", 2, 4, "last", False, id="one layer only"),
    pytest.param("gpt2", 0, 2, None, True, id="Conv1D, a block below all others, in training"),
    pytest.param("deberta-v2", 0, 2, None, False, id="task by task, a block below all others"),
])  # fmt: skip
def test_adding_and_removing_an_expert_leaves_all_others_bit_identical(
    make_model, family, first_block, rank, targets, grad
):
    model = make_model(family, HEADS, first_block={"mood": 1, "names": 2}, rank={"mood": 4, "names": 3})
    before = all_logits(model, list(HEADS), grad=grad)
    ending = list(model.backbone.linears)[-1].rpartition(".")[2]
    chosen = [ending] if targets else None
    add_random_expert(model, "third", first_block=first_block, rank=rank, targets=chosen, seed=5)
    assert_bit_identical(before, all_logits(model, list(HEADS), grad=grad))
    model.add_task("third", expert="third", level="text", num_outputs=7)
    assert_bit_identical(before, all_logits(model, list(HEADS), grad=grad))
    left = all_logits(model, ["names", "third"], grad=grad)
    model.experts.remove("mood")  # those behind it move up
    assert_bit_identical(left, all_logits(model, ["names", "third"], grad=grad))
    last = all_logits(model, ["names"], grad=grad)
    model.experts.remove("third")
    assert_bit_identical(last, all_logits(model, ["names"], grad=grad))
    assert model.experts.names == ["names"]


def test_a_layer_becomes_an_expert_layer_with_the_first_expert_that_changes_it(make_model):
    model = make_model("bert", {"names": ("word", 5)}, first_block=2)
    assert {model.backbone.block_of(name) for name in model.experts.layers} == {2}
    assert model.first_block == 2
    add_random_expert(model, "low", first_block=1, targets=["query"])
    lowest = "encoder.layer.1.attention.self.query"
    assert sorted(model.experts.layers)[0] == lowest
    assert model.encoder.get_submodule(lowest) is model.experts.layers[lowest]
    assert model.experts.layers[lowest].ranks == (0, 4)
    assert set(model.experts.get("low").deltas) == {lowest, "encoder.layer.2.attention.self.query"}


def test_a_fresh_expert_is_the_bare_backbone(make_model):
    model = make_model("bert", {"mood": ("text", 3)}, first_block=1)
    batch = batch_of(model, ["mood"])
    with torch.no_grad():
        for name, parameter in model.experts.parameters("mood").items():
            if name.endswith("lora_B"):
                parameter.zero_()
        adapted = model(batch)["mood"]
        bare = make_model("bert", {})
        hidden = bare.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    weights = batch.attention_mask[..., None].float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    expected = model.head("mood")(mean / mean.square().mean(-1, keepdim=True).sqrt())
    torch.testing.assert_close(adapted, expected, atol=1e-6, rtol=1e-5)


def test_created_numbers_depend_on_seed_and_name_only(make_model):
    def created(first, name, seed):
        model = make_model("bert", {})
        modules = model.backbone.select_linears(first_block=1)
        for earlier in first:
            model.experts.create(earlier, modules=modules, rank=8, alpha=1.0, seed=3)
        torch.manual_seed(len(first))  # the global generator does not matter
        model.experts.create(name, modules=modules, rank=4, alpha=8.0, seed=seed)
        return {module: lora_a for module, (lora_a, _) in model.experts.get(name).deltas.items()}

    alone, later = created([], "ner", 3), created(["mood", "topic"], "ner", 3)
    assert alone.keys() == later.keys()
    assert all(torch.equal(alone[module], later[module]) for module in alone)
    for other in (created([], "ner", 4), created([], "ner2", 3)):
        assert not any(torch.equal(alone[module], other[module]) for module in alone)
    first, second = list(alone.values())[:2]
    assert not torch.equal(first, second)


def test_created_numbers_are_uniform_within_pefts_bound_and_b_is_zero(make_model):
    model = make_model("bert", {})
    model.experts.create("wide", modules=list(model.backbone.linears), rank=64, alpha=8.0, seed=0)
    for lora_a, lora_b in model.experts.get("wide").deltas.values():
        bound = lora_a.shape[1] ** -0.5
        assert 0.98 * bound < lora_a.abs().max() <= bound
        assert abs(lora_a.std() / (bound / 3**0.5) - 1) < 0.05
        assert not lora_b.any()


def test_named_generator_tells_seeds_and_names_apart():
    drawn = {
        (seed, name): tuple(torch.rand(3, generator=named_generator(seed, name)).tolist())
        for seed in (0, 1, 11)
        for name in ("expert/a", "expert/b", "head/a", "1/expert/a")
    }
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_expert_that_is_taken_out_and_put_into_another_model_answers_the_same(make_model, family):
    model = make_model(family, HEADS, first_block={"mood": 0, "names": 1}, alpha=5.0)
    expert = model.experts.get("names")
    assert {model.backbone.block_of(module) for module in expert.deltas} == {1, 2}
    assert set(expert.ranks.values()) == {4}
    other = make_model(family, {"else": ("text", 2)}, rank=2)
    other.experts.add(expert)
    head = other.add_task("names", expert="names", level="word", num_outputs=5)
    head.load_state_dict(model.head("names").state_dict())
    assert_bit_identical(all_logits(model, ["names"]), all_logits(other, ["names"]))


def test_get_gives_a_copy(make_model):
    model = make_model("bert", {"mood": ("text", 3)})
    before = all_logits(model, ["mood"])
    for lora_a, lora_b in model.experts.get("mood").deltas.values():
        lora_a.zero_()
        lora_b.zero_()
    assert_bit_identical(before, all_logits(model, ["mood"]))


def test_gradients_reach_only_the_experts_that_are_trained(make_model):
    model = make_model("bert", HEADS)
    model.requires_grad_(False)
    for parameter in trainable_of(model, "names").values():
        parameter.requires_grad_(True)
    logits = model(batch_of(model, list(HEADS)))
    (logits["mood"].square().sum() + logits["names"].square().sum()).backward()
    assert all(parameter.grad is None for parameter in model.experts.parameters("mood").values())
    assert all(parameter.grad.any() for parameter in model.experts.parameters("names").values())


@pytest.mark.parametrize(("family", "first_block"), [("bert", 0), ("bert", 2), ("gpt2", 1), ("deberta-v2", 1)])
def test_no_graph_is_built_below_the_lowest_expert_layer(make_model, family, first_block):
    model = make_model(family, {"mood": ("text", 3)}, first_block=first_block)
    blocks = model.encoder.get_submodule(model.backbone.family.blocks)
    tracked = {}

    def watch(index):
        def hook(module, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            tracked[index] = (inputs[0].requires_grad, hidden.requires_grad)

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_hook(watch(index))
    model.train()
    model(batch_of(model, ["mood"]))["mood"].sum().backward()
    assert tracked == {index: (index > first_block, index >= first_block) for index in range(len(blocks))}
    trainable = {id(parameter) for parameter in trainable_of(model, "mood").values()}
    assert all((parameter.grad is not None) == (id(parameter) in trainable) for parameter in model.parameters())


# What is refused, and in which words.


def test_an_unknown_expert_is_refused_with_the_closest_one(make_model):
    model = make_model("bert", HEADS)
    for ask in (model.experts.index, model.experts.get, model.experts.remove, model.experts.parameters):
        with pytest.raises(ConfigError, match=r"Unknown expert 'name'\. Did you mean 'names'\? Known: mood, names\."):
            ask("name")


def random_delta(outputs, inputs, rank=2, rank_b=None):
    return torch.randn(rank, inputs), torch.randn(outputs, rank_b or rank)


@pytest.mark.parametrize(("name", "delta", "message"), [
    ("mood", {"encoder.layer.2.attention.self.query": random_delta(32, 32)}, "There is an expert named 'mood'"),
    ("new", {"encoder.layer.1.attention.self.query": random_delta(32, 32), "encoder.layer.9.x": random_delta(32, 32)},
     r"'new' changes the layer 'encoder\.layer\.9\.x', which this backbone does not have .*another backbone"),
    ("new", {"embeddings.word_embeddings": random_delta(32, 32)},
     "'embeddings.word_embeddings', which this backbone does not have in its blocks"),
    ("new", {"encoder.layer.2.attention.self.query": random_delta(48, 32)},
     r"A \(2, 32\) and B \(48, 2\) for the layer .*query' of 32 inputs and 32 outputs"),
    ("new", {"encoder.layer.2.intermediate.dense": random_delta(32, 48)},
     r"A \(2, 48\) and B \(32, 2\) for the layer .* of 32 inputs and 48 outputs"),
    ("new", {"encoder.layer.2.attention.self.query": random_delta(32, 32, 2, 3)},
     r"A \(2, 32\) and B \(32, 3\) .*belongs to another backbone"),
])  # fmt: skip
def test_an_expert_that_does_not_fit_is_refused_and_nothing_changes(make_model, name, delta, message):
    model = make_model("bert", HEADS, first_block=2)
    before = all_logits(model, list(HEADS))
    with pytest.raises(CheckpointError, match=message):
        model.experts.add(Expert(name, 4.0, delta))
    assert model.experts.names == list(HEADS)
    assert_bit_identical(before, all_logits(model, list(HEADS)))
    add_random_expert(model, "later", first_block=0)  # still whole
    assert_bit_identical(before, all_logits(model, list(HEADS)))
