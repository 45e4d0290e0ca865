"""Routings, and the slot that hands one to the expert layers."""

import pytest
import torch
from torch import nn

from sparse_ft.experts.layer import ExpertLayer
from sparse_ft.experts.routing import Routing, RoutingSlot


def test_an_expert_layer_outside_a_forward_pass_says_so():
    layer = ExpertLayer(nn.Linear(3, 4), slot=RoutingSlot())
    with pytest.raises(RuntimeError, match=r"outside SparseExpertModel\.forward: no routing is set"):
        layer(torch.randn(1, 2, 3))


def test_a_second_forward_pass_inside_the_first_is_refused_and_leaves_the_first_alone():
    slot = RoutingSlot()
    first = Routing.one_hot([0])
    with slot.filled(first):
        with (
            pytest.raises(RuntimeError, match="already in a forward pass in this thread"),
            slot.filled(Routing.one_hot([1])),
        ):
            pass
        assert slot.read() is first


def test_the_slot_is_empty_again_after_a_forward_pass_that_failed():
    slot = RoutingSlot()
    with pytest.raises(ZeroDivisionError), slot.filled(Routing.one_hot([0])):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="no routing is set"):
        slot.read()
    with slot.filled(Routing.one_hot([1])):
        assert slot.read().only == 1


def test_only_is_the_expert_of_all_rows_if_they_agree():
    assert Routing.one_hot([2, 2, 2]).only == 2
    assert Routing.one_hot([2, 1, 2]).only is None
    assert Routing(torch.tensor([[2], [2]]), torch.ones(2, 1)).only == 2
    assert Routing(torch.tensor([[2], [2]]), torch.tensor([[1.0], [0.5]])).only is None
    assert Routing(torch.tensor([[2, 1]]), torch.ones(1, 2)).only is None
    assert Routing(None, torch.ones(1, 1)).only is None


def test_weights_of_an_expert_by_row_and_by_token():
    rows = Routing(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.0]]))
    assert rows.weights_of(2).tolist() == [[0.75], [0.0]]
    assert rows.weights_of(0).tolist() == [[0.25], [0.0]]
    assert rows.present == [0, 1, 2]
    tokens = Routing(torch.tensor([[2, 0]]), torch.tensor([[[0.75, 0.25], [0.0, 1.0]]]))
    assert tokens.weights_of(2).tolist() == [[0.75, 0.0]]
    assert tokens.weights_of(1).tolist() == [[0.0, 0.0]]
    everyone = Routing(None, torch.tensor([[0.25, 0.75]]))
    assert everyone.weights_of(1).tolist() == [[0.75]]
    assert everyone.present is None


def test_take_gives_the_routing_of_some_rows():
    routing = Routing(torch.tensor([[2], [1], [0]]), torch.rand(3, 1), logits=torch.rand(3, 4))
    part = routing.take([2, 0])
    assert part.experts.tolist() == [[0], [2]]
    assert torch.equal(part.weights, routing.weights[[2, 0]])
    assert torch.equal(part.logits, routing.logits[[2, 0]])
    assert routing.take(slice(1, 3)).experts.tolist() == [[1], [0]]


def test_stretches_are_the_rows_that_one_expert_serves_alone():
    def cut(routing, *, single_rows=False):
        return [(part.start, part.stop) for part in routing.segments(single_rows=single_rows)]

    assert cut(Routing.one_hot([1, 1, 0, 1])) == [(0, 2), (2, 3), (3, 4)]
    assert cut(Routing.one_hot([1, 1, 0, 1]), single_rows=True) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert cut(Routing(torch.tensor([[1], [1]]), torch.tensor([[0.5], [0.5]]))) == [(0, 1), (1, 2)]
    assert cut(Routing(torch.tensor([[1, 0], [1, 0]]), torch.tensor([[1.0, 0.0]] * 2))) == [(0, 1), (1, 2)]
    assert cut(Routing.one_hot([])) == []


# Routings that a gate made, turned into those of the model


def random_routing(kind, *, rows=4, tokens=5, gated=3, chosen=2):
    """Weights of all experts of a gate or of some, by row or by token."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(gated, generator=generator)[:chosen] for _ in range(rows)])
    shape = (rows, *([tokens] if "token" in kind else []), gated if "all" in kind else chosen)
    return Routing(None if "all" in kind else experts, torch.rand(shape, generator=generator))


def by_loop(routing, num_experts):
    """The weight of every expert, row by row and choice by choice, [N, E] or [N, S, E]."""
    every = torch.zeros(*routing.weights.shape[:-1], num_experts)
    for row in range(len(every)):
        for choice in range(routing.weights.shape[-1]):
            expert = choice if routing.experts is None else int(routing.experts[row, choice])
            every[row, ..., expert] += routing.weights[row, ..., choice]
    return every


KINDS = pytest.mark.parametrize("kind", ["some by row", "all by row", "some by token", "all by token"])


@KINDS
def test_spread_gives_every_expert_its_weight(kind):
    routing = random_routing(kind)
    assert torch.equal(routing.dense_weights(3), by_loop(routing, 3))
    if "some" in kind:
        assert torch.equal(routing.dense_weights(7)[..., :3], routing.dense_weights(3))
        assert not routing.dense_weights(7)[..., 3:].any()


@KINDS
def test_placed_moves_each_weight_to_the_place_of_its_expert(kind):
    routing = random_routing(kind)
    expected = torch.zeros(*routing.weights.shape[:-1], 6)
    expected[..., [4, 0, 2]] = by_loop(routing, 3)
    placed = routing.reindexed([4, 0, 2], num_experts=6)
    assert torch.equal(placed.dense_weights(6), expected)
    assert (placed.experts is None) == (routing.experts is None)
    assert routing.reindexed([0, 1, 2], num_experts=3) is routing
    assert torch.equal(
        routing.reindexed([0, 2, 1], num_experts=3).dense_weights(3), by_loop(routing, 3)[..., [0, 2, 1]]
    )


@KINDS
def test_placed_keeps_what_the_gate_said_and_lets_the_gradient_through(kind):
    routing = random_routing(kind)
    weights, logits = routing.weights.requires_grad_(), torch.rand(4, 3)
    placed = Routing(routing.experts, weights, logits).reindexed([4, 0, 2], num_experts=6)
    assert placed.logits is logits
    (placed.dense_weights(6) * torch.arange(6.0)).sum().backward()
    assert weights.grad.abs().sum() > 0


@KINDS
@pytest.mark.parametrize("expert", [1, 4], ids=["that some rows choose", "that no row chooses"])
def test_plus_gives_one_expert_a_weight_of_1_in_some_rows(kind, expert):
    routing = random_routing(kind).reindexed([4, 1, 2] if expert == 1 else [0, 1, 2], num_experts=6)
    rows = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = by_loop(routing, 6)
    expected[rows.bool(), ..., expert] = 1.0
    assert torch.equal(routing.with_expert(expert, rows).dense_weights(6), expected)
    assert torch.equal(routing.with_expert(expert, torch.zeros(4)).dense_weights(6), by_loop(routing, 6))


@KINDS
def test_one_row_of_a_routing_with_a_shared_expert_is_that_row_alone(kind):
    routing, rows = random_routing(kind).reindexed([4, 0, 2], num_experts=6), torch.tensor([1.0, 0.0, 1.0, 0.0])
    whole = routing.with_expert(5, rows).dense_weights(6)
    for row in range(4):
        alone = routing.take(slice(row, row + 1)).with_expert(5, rows[row : row + 1])
        assert torch.equal(alone.dense_weights(6)[0], whole[row])
