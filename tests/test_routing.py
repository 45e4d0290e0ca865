"""Routings, and the slot that hands one to the expert layers."""

import pytest
import torch
from torch import nn

from sparse_ft.expert_layer import ExpertLayer
from sparse_ft.routing import Routing, RoutingSlot


def test_an_expert_layer_outside_a_forward_pass_says_so():
    layer = ExpertLayer(nn.Linear(3, 4), slot=RoutingSlot())
    with pytest.raises(RuntimeError, match=r"outside SparseExpertModel\.forward: no routing is set"):
        layer(torch.randn(1, 2, 3))


def test_a_second_forward_pass_inside_the_first_is_refused_and_leaves_the_first_alone():
    slot = RoutingSlot()
    first = Routing.rows([0])
    with slot.filled(first):
        with (
            pytest.raises(RuntimeError, match="already in a forward pass in this thread"),
            slot.filled(Routing.rows([1])),
        ):
            pass
        assert slot.read() is first


def test_the_slot_is_empty_again_after_a_forward_pass_that_failed():
    slot = RoutingSlot()
    with pytest.raises(ZeroDivisionError), slot.filled(Routing.rows([0])):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="no routing is set"):
        slot.read()
    with slot.filled(Routing.rows([1])):
        assert slot.read().only == 1


def test_replace_changes_the_routing_of_the_running_pass_only():
    slot = RoutingSlot()
    with pytest.raises(RuntimeError, match="no routing is set"):
        slot.replace(Routing.rows([0]))
    with slot.filled(Routing.rows([0])):
        slot.replace(Routing.rows([1]))
        assert slot.read().only == 1
    with slot.filled(Routing.rows([0])):
        assert slot.read().only == 0


def test_only_is_the_expert_of_all_rows_if_they_agree():
    assert Routing.rows([2, 2, 2]).only == 2
    assert Routing.rows([2, 1, 2]).only is None
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
        return [(part.start, part.stop) for part in routing.stretches(single_rows=single_rows)]

    assert cut(Routing.rows([1, 1, 0, 1])) == [(0, 2), (2, 3), (3, 4)]
    assert cut(Routing.rows([1, 1, 0, 1]), single_rows=True) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert cut(Routing(torch.tensor([[1], [1]]), torch.tensor([[0.5], [0.5]]))) == [(0, 1), (1, 2)]
    assert cut(Routing(torch.tensor([[1, 0], [1, 0]]), torch.tensor([[1.0, 0.0]] * 2))) == [(0, 1), (1, 2)]
    assert cut(Routing.rows([])) == []


def test_the_weights_of_all_experts_whatever_form_the_routing_has():
    per_row = Routing(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.7, 0.3], [1.0, 0.0]]))
    assert per_row.spread(4).tolist() == torch.tensor([[0.3, 0, 0.7, 0], [0, 1.0, 0, 0]]).tolist()
    every_row = Routing(None, torch.tensor([[0.2, 0.8]]))
    assert every_row.spread(2).shape == (1, 2)
    shortlist = Routing(torch.tensor([[2, 0]]), torch.tensor([[[0.7, 0.3], [0.0, 1.0], [0.0, 0.0]]]))
    expected = torch.tensor([[[0.3, 0.0, 0.7], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(shortlist.spread(3), expected)
    assert torch.equal(Routing(None, expected).spread(3), expected)
