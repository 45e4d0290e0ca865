import copy

import pytest
import torch
from conftest import add_random_expert
from torch import nn

from sparse_ft.batching import collate
from sparse_ft.encoding import Encoder
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.experts import Expert, ExpertLayer, Routing, RoutingSlot, linear_shape, named_generator

INPUTS, OUTPUTS = 12, 20
HEADS = {"mood": ("text", 3), "names": ("word", 5)}


def frozen_linear(kind):
    """A frozen layer of 12 inputs and 20 outputs."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS) if kind == "linear" else Conv1D(OUTPUTS, INPUTS)
    return layer.requires_grad_(False)


def random_layer(kind, experts, *, dtype=torch.float32):
    """An expert layer with the given (rank, scale) experts; rank 0 is an expert that does not touch it."""
    layer = ExpertLayer(frozen_linear(kind), slot=RoutingSlot())
    generator = torch.Generator().manual_seed(1)
    for rank, scale in experts:
        lora_a = torch.randn(rank, INPUTS, generator=generator)
        layer.add(lora_a, torch.randn(OUTPUTS, rank, generator=generator), scale=scale)
    return layer.to(dtype)


def call(layer, x, routing):
    with layer.slot.filled(Routing(tuple(routing))):
        return layer(x)


def dense_float64(layer, x, routing):
    """W x + b, plus scale * (B A) x of each row's expert: every delta as a full matrix, in float64."""
    weight = layer.frozen.weight.double()
    weight = weight if isinstance(layer.frozen, nn.Linear) else weight.T
    rows = []
    for row, expert in zip(x.double(), routing, strict=True):
        delta = layer.scales[expert] * layer.lora_b[expert].double() @ layer.lora_a[expert].double()
        rows.append(row @ (weight + delta).T + layer.frozen.bias.double())
    return torch.stack(rows)


# One layer.


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_one_expert_is_pefts_lora(kind):
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = frozen_linear(kind)

        def forward(self, x):
            return self.proj(x)

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], fan_in_fan_out=kind == "conv1d")
    reference = get_peft_model(Net(), config)
    lora_a = reference.base_model.model.proj.lora_A["default"].weight
    lora_b = reference.base_model.model.proj.lora_B["default"].weight
    nn.init.normal_(lora_b)
    layer = ExpertLayer(frozen_linear(kind), slot=RoutingSlot())
    layer.add(lora_a.detach().clone(), lora_b.detach().clone(), scale=6 / 4)

    for routing in ([0, 0, 0], [0, 1, 0]):  # the second goes the way of mixed batches
        if 1 in routing:
            layer.add_untouched(scale=1.0)
        x = torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(2))
        x_peft, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = reference(x_peft), call(layer, x_ours, routing)
        served = torch.tensor([place for place, expert in enumerate(routing) if expert == 0])
        torch.testing.assert_close(got[served], expected[served], atol=2e-6, rtol=1e-6)
        reference.zero_grad()
        layer.zero_grad()
        expected[served].square().sum().backward()
        got[served].square().sum().backward()
        for ours, theirs in (
            (layer.lora_a[0].grad, lora_a.grad),
            (layer.lora_b[0].grad, lora_b.grad),
            (x_ours.grad, x_peft.grad),
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_several_experts_equal_the_dense_sum_in_float64(kind, seed):
    experts = [(4, 2.0), (1, 0.5), (0, 3.0), (9, 1.25), (4, 1.0)]
    layer = random_layer(kind, experts)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 3, INPUTS, generator=generator)
    routing = torch.randint(0, len(experts), (7,), generator=generator).tolist()
    torch.testing.assert_close(call(layer, x, routing).double(), dense_float64(layer, x, routing), atol=1e-4, rtol=1e-5)
    for expert in range(len(experts)):
        alone = [expert] * 7
        torch.testing.assert_close(call(layer, x, alone).double(), dense_float64(layer, x, alone), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("routing", [[1, 1, 1], [0, 2, 1], [1, 3, 1]])
def test_gradients_are_those_of_finite_differences(kind, routing):
    layer = random_layer(kind, [(2, 2.0), (3, 0.5), (1, 1.5), (0, 1.0)], dtype=torch.float64)
    x = torch.randn(3, 2, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad and parameter.numel())]
    assert len(inputs) == 7
    assert torch.autograd.gradcheck(lambda *_: call(layer, x, routing), inputs)


def test_an_expert_without_a_rank_here_leaves_the_frozen_layer_as_it_is():
    layer = random_layer("linear", [(4, 2.0), (0, 1.0), (0, 1.0)])
    x = torch.randn(4, 3, INPUTS)
    frozen = layer.frozen(x)
    assert torch.equal(call(layer, x, [1, 1, 1, 1]), frozen)
    assert torch.equal(call(layer, x, [1, 2, 1, 2]), frozen)
    mixed = call(layer, x, [1, 0, 2, 0])
    torch.testing.assert_close(mixed[[0, 2]], frozen[[0, 2]])
    assert not torch.allclose(mixed[[1, 3]], frozen[[1, 3]], atol=0.1)


@pytest.mark.parametrize("routing", [[1, 1], [0, 1]])
def test_only_the_experts_of_the_batch_get_a_gradient_and_the_frozen_layer_gets_none(routing):
    layer = random_layer("linear", [(4, 2.0), (4, 1.0), (4, 1.0)])
    call(layer, torch.randn(2, 3, INPUTS), routing).sum().backward()
    reached = {index for index in range(3) if layer.lora_a[index].grad is not None and layer.lora_a[index].grad.any()}
    assert reached == set(routing)
    assert layer.lora_a[2].grad is None
    assert layer.frozen.weight.grad is None


@pytest.mark.parametrize("routing", [[0, 0, 0], [0, 1, 0]])
def test_dropout_acts_in_training_only_and_never_on_the_frozen_path(routing):
    layer = random_layer("linear", [(4, 2.0), (0, 1.0)])
    layer.dropout = 0.5
    x = torch.randn(3, 5, INPUTS)
    exact = dense_float64(layer, x, routing)
    torch.testing.assert_close(call(layer.eval(), x, routing).double(), exact, atol=1e-4, rtol=1e-5)
    layer.train()
    first, second = call(layer, x, routing), call(layer, x, routing)
    assert not torch.equal(first[0], second[0])
    if 1 in routing:
        torch.testing.assert_close(first[1], layer.frozen(x)[1])
    torch.manual_seed(0)
    mean = torch.stack([call(layer, x, routing) for _ in range(1500)]).mean(0)
    assert (mean - exact).abs().mean() < 0.1 * (exact - layer.frozen(x)).abs().mean()  # unbiased
    with torch.no_grad():
        layer.lora_b[0].zero_()
    torch.testing.assert_close(call(layer, x, routing), layer.frozen(x))


@pytest.mark.parametrize("routing", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_bf16_frozen_weights_train_float32_experts(routing):
    exact = random_layer("linear", [(4, 1.0), (2, 0.5)])
    layer = copy.deepcopy(exact)
    layer.frozen.to(torch.bfloat16)
    x = torch.randn(4, 3, INPUTS, generator=torch.Generator().manual_seed(4))
    got, expected = call(layer, x.bfloat16(), routing), call(exact, x, routing)
    assert got.dtype == torch.bfloat16
    # bf16 keeps 8 bits: half a percent of the largest summand, a few times over.
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()
    (got.float() - 1).square().mean().backward()
    (expected - 1).square().mean().backward()
    for ours, theirs in zip(layer.lora_a[1:], exact.lora_a[1:], strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.999


def test_linear_shape_knows_that_conv1d_is_transposed():
    assert linear_shape(frozen_linear("linear")) == linear_shape(frozen_linear("conv1d")) == (OUTPUTS, INPUTS)


# The slot.


def test_an_expert_layer_outside_a_forward_pass_says_so():
    layer = random_layer("linear", [(4, 2.0)])
    with pytest.raises(RuntimeError, match=r"outside SparseExpertModel\.forward: no routing is set"):
        layer(torch.randn(1, 2, INPUTS))


def test_a_second_forward_pass_inside_the_first_is_refused_and_leaves_the_first_alone():
    slot = RoutingSlot()
    with slot.filled(Routing((0,))):
        with (
            pytest.raises(RuntimeError, match="already in a forward pass; use one model object per thread"),
            slot.filled(Routing((1,))),
        ):
            pass
        assert slot.read() == Routing((0,))


def test_the_slot_is_empty_again_after_a_forward_pass_that_failed():
    slot = RoutingSlot()
    with pytest.raises(ZeroDivisionError), slot.filled(Routing((0,))):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="no routing is set"):
        slot.read()
    with slot.filled(Routing((1,))):
        assert slot.read().only == 1


def test_only_is_the_expert_of_all_rows_if_they_agree():
    assert Routing((2, 2, 2)).only == 2
    assert Routing((2, 1, 2)).only is None


# Many layers.


def batch_of(model, tasks):
    """Rows of the given tasks, padded."""
    encoder = Encoder(model.backbone, max_length=64)
    rows = []
    for task in tasks:
        texts = ["The quick brown fox", "Ada Lovelace met Charles Babbage in London in spring", "well"]
        if model.tasks[task].level == "word":
            rows += [(task, example) for example in encoder.words([text.split() for text in texts])]
        else:
            rows += [(task, example) for example in encoder.texts(texts)]
    return collate(rows, pad_id=model.backbone.pad_id)


def all_logits(model, tasks, *, grad=False):
    """The logits of each task alone, and of all in one mixed batch."""
    with torch.set_grad_enabled(grad):
        found = {f"{task} alone": model(batch_of(model, [task]))[task] for task in tasks}
        return found | {f"{task} mixed": logits for task, logits in model(batch_of(model, tasks)).items()}


def assert_bit_identical(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


# Families: linear and Conv1D, both directions of attention, and the one that is routed task by task.
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2"])
@pytest.mark.parametrize(
    ("first_block", "rank", "targets"),
    [
        pytest.param(1, 4, None, id="the same layers and rank"),
        pytest.param(1, 16, None, id="a larger rank"),
        pytest.param(0, 2, None, id="a block below all others"),
        pytest.param(2, 4, "last", id="one layer only"),
    ],
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
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
    assert model.experts.layers[lowest].lora_a[model.experts.index("names")].numel() == 0
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
    expected = model.head("mood")((hidden * weights).sum(1) / weights.sum(1))
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


def test_train_only_lets_gradients_into_the_named_experts(make_model):
    model = make_model("bert", HEADS)
    model.experts.train_only(["names"])
    logits = model(batch_of(model, list(HEADS)))
    (logits["mood"].square().sum() + logits["names"].square().sum()).backward()
    assert all(parameter.grad is None for parameter in model.experts.parameters("mood").values())
    assert all(parameter.grad.any() for parameter in model.experts.parameters("names").values())


def test_set_dropout_reaches_every_layer(make_model):
    model = make_model("bert", {"mood": ("text", 3)}, first_block=1)
    model.experts.set_dropout(0.25)
    assert {layer.dropout for layer in model.experts.layers.values()} == {0.25}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("first_block", [0, 1, 2])
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
    trainable = {id(parameter) for parameter in model.trainable("mood").values()}
    assert all((parameter.grad is not None) == (id(parameter) in trainable) for parameter in model.parameters())


# What is refused, and in which words.


def test_an_unknown_expert_is_refused_with_the_closest_one(make_model):
    model = make_model("bert", HEADS)
    for ask in (model.experts.index, model.experts.get, model.experts.remove, model.experts.parameters):
        with pytest.raises(ConfigError, match=r"Unknown expert 'name'\. Did you mean 'names'\? Known: mood, names\."):
            ask("name")


def random_delta(outputs, inputs, rank=2, rank_b=None):
    return torch.randn(rank, inputs), torch.randn(outputs, rank_b or rank)


@pytest.mark.parametrize(
    ("name", "delta", "message"),
    [
        ("mood", {"encoder.layer.2.attention.self.query": random_delta(32, 32)}, "There is an expert named 'mood'"),
        (
            "new",
            {"encoder.layer.1.attention.self.query": random_delta(32, 32), "encoder.layer.9.x": random_delta(32, 32)},
            r"'new' changes the layer 'encoder\.layer\.9\.x', which this backbone does not have .*another backbone",
        ),
        (
            "new",
            {"embeddings.word_embeddings": random_delta(32, 32)},
            "'embeddings.word_embeddings', which this backbone does not have in its blocks",
        ),
        (
            "new",
            {"encoder.layer.2.attention.self.query": random_delta(48, 32)},
            r"A \(2, 32\) and B \(48, 2\) for the layer .*query' of 32 inputs and 32 outputs",
        ),
        (
            "new",
            {"encoder.layer.2.intermediate.dense": random_delta(32, 48)},
            r"A \(2, 48\) and B \(32, 2\) for the layer .* of 32 inputs and 48 outputs",
        ),
        (
            "new",
            {"encoder.layer.2.attention.self.query": random_delta(32, 32, 2, 3)},
            r"A \(2, 32\) and B \(32, 3\) .*belongs to another backbone",
        ),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_and_nothing_changes(make_model, name, delta, message):
    model = make_model("bert", HEADS, first_block=2)
    before = all_logits(model, list(HEADS))
    with pytest.raises(CheckpointError, match=message):
        model.experts.add(Expert(name, 4.0, delta))
    assert model.experts.names == list(HEADS)
    assert_bit_identical(before, all_logits(model, list(HEADS)))
    add_random_expert(model, "later", first_block=0)  # still whole
    assert_bit_identical(before, all_logits(model, list(HEADS)))
