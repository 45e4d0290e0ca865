"""Heads: where their weights come from, and in which precision they answer."""

import torch

from sparse_ft.experts.heads import Head
from sparse_ft.experts.routing import RoutingSlot


def test_initial_weights_depend_on_seed_and_name_only():
    def filled(seed, name):
        head = Head(64, 30, slot=RoutingSlot())
        head.initialise(seed=seed, name=name)
        return head.linear

    torch.manual_seed(0)
    first = filled(3, "ner")
    torch.manual_seed(1)
    again = filled(3, "ner")
    assert torch.equal(first.weight, again.weight)
    assert not first.bias.any()
    assert abs(first.weight.std() / 0.02 - 1) < 0.05
    assert not torch.equal(first.weight, filled(4, "ner").weight)
    assert not torch.equal(first.weight, filled(3, "mood").weight)


def test_a_head_is_a_float32_linear_with_dropout_in_training_only():
    head = Head(16, 4, slot=RoutingSlot())
    head.dropout = 0.5
    head.initialise(seed=0, name="x")
    hidden = torch.randn(6, 16).bfloat16()
    head.eval()
    got = head(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, hidden.float() @ head.linear.weight.T + head.linear.bias)
    head.train()
    assert not torch.equal(head(hidden), head(hidden))
