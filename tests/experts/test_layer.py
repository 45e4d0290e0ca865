"""One expert layer against PEFT, a dense float64 sum and finite differences."""

import copy

import pytest
import torch
from torch import nn

from sparse_ft.experts.layer import ExpertLayer
from sparse_ft.experts.routing import Routing, RoutingSlot

INPUTS, OUTPUTS = 12, 20


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
    deltas = []
    for rank, _ in experts:
        lora_a = torch.randn(rank, INPUTS, generator=generator)
        deltas.append((lora_a, torch.randn(OUTPUTS, rank, generator=generator)))
    layer.extend(deltas, scales=[scale for _, scale in experts])
    return layer.to(dtype)


def open_all(layer):
    """Make parameters of all experts."""
    return [layer.open(index) for index in range(len(layer.ranks))]


def call(layer, x, routing):
    with layer.slot.filled(routing if isinstance(routing, Routing) else Routing.one_hot(routing)):
        return layer(x)


def dense_float64(layer, x, routing):
    """W x + b, plus scale * (B A) x of each row's expert: every delta as a full matrix, in float64."""
    weight = layer.frozen.weight.double()
    weight = weight if isinstance(layer.frozen, nn.Linear) else weight.T
    rows = []
    for row, expert in zip(x.double(), routing, strict=True):
        lora_a, lora_b = layer.get(expert)
        delta = layer.scales[expert] * lora_b.double() @ lora_a.double()
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
    layer.extend([(lora_a.detach().clone(), lora_b.detach().clone())], scales=[6 / 4])
    ours_a, ours_b = layer.open(0)

    for routing in ([0, 0, 0], [0, 1, 0]):  # the second goes the way of mixed batches
        if 1 in routing:
            layer.extend([None], scales=[1.0])
        x = torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(2))
        x_peft, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = reference(x_peft), call(layer, x_ours, routing)
        served = torch.tensor([index for index, expert in enumerate(routing) if expert == 0])
        torch.testing.assert_close(got[served], expected[served], atol=2e-6, rtol=1e-6)
        reference.zero_grad()
        layer.zero_grad()
        expected[served].square().sum().backward()
        got[served].square().sum().backward()
        for ours, theirs in ((ours_a.grad.T, lora_a.grad), (ours_b.grad.T, lora_b.grad), (x_ours.grad, x_peft.grad)):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("seed", range(2))
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
    open_all(layer)
    x = torch.randn(3, 2, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad and parameter.numel())]
    assert len(inputs) == 7
    assert torch.autograd.gradcheck(lambda *_: call(layer, x, routing), inputs, fast_mode=True)


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
    opened = open_all(layer)
    call(layer, torch.randn(2, 3, INPUTS), routing).sum().backward()
    reached = {index for index, (lora_a, _) in enumerate(opened) if lora_a.grad is not None and lora_a.grad.any()}
    assert reached == set(routing)
    assert opened[2][0].grad is None
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
    mean = torch.stack([call(layer, x, routing) for _ in range(600)]).mean(0)
    assert (mean - exact).abs().mean() < 0.1 * (exact - layer.frozen(x)).abs().mean()  # unbiased
    layer.get(0)[1].zero_()
    torch.testing.assert_close(call(layer, x, routing), layer.frozen(x))


@pytest.mark.parametrize("routing", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_bf16_frozen_weights_train_float32_experts(routing):
    exact = random_layer("linear", [(4, 1.0), (2, 0.5)])
    open_all(exact)
    layer = copy.deepcopy(exact)
    layer.frozen.to(torch.bfloat16)
    x = torch.randn(4, 3, INPUTS, generator=torch.Generator().manual_seed(4))
    got, expected = call(layer, x.bfloat16(), routing), call(exact, x, routing)
    assert got.dtype == torch.bfloat16
    # bf16 keeps 8 bits: half a percent of the largest summand, a few times over.
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()
    (got.float() - 1).square().mean().backward()
    (expected - 1).square().mean().backward()
    for ours, theirs in zip(layer.open(1), exact.open(1), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.999


# Several experts a row, and weights.


def random_routing(rows, tokens, experts, chosen, *, seed, by_token):
    """Distinct experts a row with positive weights, some of which are 0."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(rows)])
    shape = (rows, tokens, chosen) if by_token else (rows, chosen)
    weights = torch.rand(shape, generator=generator)
    return Routing(indices, torch.where(weights < 0.2, 0.0, weights))


def dense_mixture_float64(layer, x, routing):
    """W x + b + sum of w * scale * (B A) x over all experts, token by token."""
    y = (
        dense_float64(layer, x, [layer.ranks.index(0)] * len(x))
        if 0 in layer.ranks
        else layer.frozen.double()(x.double())
    )
    for index in range(len(layer.ranks)):
        lora_a, lora_b = layer.get(index)
        delta = layer.scales[index] * lora_b.double() @ lora_a.double()
        y = y + routing.weights_of(index).double().unsqueeze(-1) * (x.double() @ delta.T)
    return y


EXPERTS = [(4, 2.0), (1, 0.5), (0, 3.0), (9, 1.25), (4, 1.0), (2, 0.75)]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("by_token", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_mixtures_equal_the_dense_sum_in_float64(kind, by_token, chosen, grad):
    layer = random_layer(kind, EXPERTS)
    if grad:
        open_all(layer)
    x = torch.randn(5, 3, INPUTS, generator=torch.Generator().manual_seed(chosen))
    routing = random_routing(5, 3, len(EXPERTS), chosen, seed=chosen, by_token=by_token)
    with torch.set_grad_enabled(grad):
        got = call(layer, x, routing)
    torch.testing.assert_close(got.double(), dense_mixture_float64(layer, x, routing), atol=1e-4, rtol=1e-5)
    # The dense way: a weight for every expert, none named.
    everyone = torch.stack([routing.weights_of(index).expand(5, 3 if by_token else 1) for index in range(6)], -1)
    dense = Routing(None, everyone if by_token else everyone.squeeze(1))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(call(layer, x, dense), got, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("by_token", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("ranks", [[4, 8] * 6, [1, 4, 0] * 4], ids=["multiples", "any"])
def test_a_row_gets_its_answer_whether_its_batch_names_few_experts_or_many(ranks, by_token, grad):
    layer = random_layer("linear", [(rank, 2.0) for rank in ranks])
    if grad:
        open_all(layer)
    x = torch.randn(8, 3, INPUTS, generator=torch.Generator().manual_seed(0))
    routing = random_routing(8, 3, len(ranks), 2, seed=1, by_token=by_token)
    with torch.set_grad_enabled(grad):
        together = call(layer, x, routing)
        alone = torch.cat([call(layer, x[row : row + 1], routing.take([row])) for row in range(8)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.double(), dense_mixture_float64(layer, x, routing), atol=1e-4, rtol=1e-5)


def test_a_routing_used_again_gives_its_weights_their_gradient():
    layer = random_layer("linear", EXPERTS)
    x = torch.randn(2, 3, INPUTS)
    weights = torch.rand(2, 2, requires_grad=True)
    routing = Routing(torch.tensor([[0, 3], [1, 4]]), weights)
    with torch.no_grad():
        call(layer, x, routing)
    gradients = []
    for _ in range(2):
        weights.grad = None
        call(layer, x, routing).square().sum().backward()
        gradients.append(weights.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_a_frozen_linear_may_have_no_bias():
    layer = ExpertLayer(nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False), slot=RoutingSlot())
    layer.extend([(torch.randn(4, INPUTS), torch.randn(OUTPUTS, 4)) for _ in range(2)], scales=[1.0, 1.0])
    lora_a, lora_b = layer.open(1)
    x = torch.randn(2, 3, INPUTS)
    expected = layer.frozen(x) + x @ lora_a @ lora_b
    torch.testing.assert_close(call(layer, x, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call(layer, x, [1, 0])[:1], expected[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_token", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("named", ["many", "few", None])
def test_gradients_of_mixtures_and_their_weights_are_those_of_finite_differences(by_token, named):
    layer = random_layer("linear", [(2, 2.0), (3, 0.5), (0, 1.0), (1, 1.5), (2, 1.0), (2, 0.5)], dtype=torch.float64)
    opened = [parameter for pair in open_all(layer) for parameter in pair if parameter.numel()]
    x = torch.randn(3, 2, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    choices = {"many": [[0, 1], [3, 4], [2, 5]], "few": [[0, 1], [3, 0], [2, 1]]}
    indices = torch.tensor(choices[named]) if named else None
    shape = (3, 2, 2 if named else 6) if by_token else (3, 2 if named else 6)
    weights = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weights, *_: call(layer, x, Routing(indices, weights)), [x, weights, *opened], fast_mode=True
    )


def test_one_expert_with_weight_one_is_the_same_whichever_way_it_is_asked():
    layer = random_layer("linear", EXPERTS)
    x = torch.randn(2, 3, INPUTS)
    known = call(layer, x, [3, 3])
    gathered = call(layer, x, Routing(torch.tensor([[3, 0], [3, 1]]), torch.tensor([[1.0, 0.0]] * 2)))
    one_hot = torch.zeros(2, len(EXPERTS))
    one_hot[:, 3] = 1.0
    for other in (gathered, call(layer, x, Routing(None, one_hot))):
        torch.testing.assert_close(other, known)


@pytest.mark.parametrize("routing", [
    [0, 0], [0, 3], Routing(torch.tensor([[0, 3], [1, 4]]), torch.rand(2, 2)), Routing(None, torch.rand(2, 3, 6)),
])  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_bf16_autocast(routing, grad):
    layer = random_layer("linear", EXPERTS)
    if grad:
        open_all(layer)
    x = torch.randn(2, 3, INPUTS)
    with torch.set_grad_enabled(grad):
        exact = call(layer, x, routing)
        with torch.autocast("cpu", torch.bfloat16):
            got = call(layer, x, routing)
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).abs().max() < 0.03 * exact.abs().max()


# The banks.


def test_parameters_are_views_into_the_banks_through_adding_removing_and_moving():
    layer = random_layer("linear", [(4, 2.0), (2, 1.0), (3, 0.5)])
    lora_a, lora_b = layer.open(1)
    layer.extend([(torch.ones(2, INPUTS), torch.ones(OUTPUTS, 2)), None], scales=[1.0, 1.0])
    layer.remove(0)
    layer.to("cpu").float()
    assert layer.ranks == (2, 3, 2, 0)
    assert layer.open(0)[0] is lora_a
    with torch.no_grad():
        lora_a.fill_(7.0)
        lora_b.fill_(5.0)
    assert bool((layer.get(0)[0] == 7).all())
    assert bool((layer.get(0)[1] == 5).all())
    assert bool((layer.get(2)[0] == 1).all())
    assert {id(parameter) for parameter in layer.parameters()} >= {id(lora_a), id(lora_b)}
    layer.remove(0)
    assert not layer.opened
    assert len(layer.bank_a) == 5 * INPUTS
    assert len(layer.bank_b) == 1 + 5  # the bias


def test_an_optimizer_step_moves_the_bank():
    layer = random_layer("linear", [(4, 2.0), (2, 1.0)])
    others = [tensor.clone() for tensor in layer.get(0)]
    before = [tensor.clone() for tensor in layer.get(1)]
    optimizer = torch.optim.AdamW(layer.open(1), lr=0.1, fused=True)
    call(layer, torch.randn(2, 3, INPUTS), [1, 0]).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(left, right) for left, right in zip(before, layer.get(1), strict=True))
    assert all(torch.equal(left, right) for left, right in zip(others, layer.get(0), strict=True))


def test_a_deep_copy_is_whole_and_apart():
    layer = random_layer("linear", [(4, 2.0), (2, 1.0)])
    layer.open(1)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.open(1)[0].zero_()
    assert not other.get(1)[0].any()
    assert layer.get(1)[0].any()


def test_one_more_expert_takes_the_memory_of_its_weights_only():
    layer = random_layer("linear", [(4, 1.0)] * 50)
    layer.open(3)
    size = sum(tensor.untyped_storage().nbytes() for tensor in (layer.bank_a, layer.bank_b))
    assert size == (50 * 4 * (INPUTS + OUTPUTS) + OUTPUTS) * 4  # and one bias
    assert layer.open(3)[0].untyped_storage().data_ptr() == layer.bank_a.untyped_storage().data_ptr()
