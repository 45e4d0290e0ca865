"""What a gate did in a pass: losses as in losses.py, use of the experts against loops, and when an alarm sounds."""

from dataclasses import replace

import pytest
import torch

from sparse_ft.config import GateConfig
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection
from sparse_ft.training.gate_losses import alarms, auxiliary_losses, load_balancing_loss, routing_cross_entropy, z_loss

GATED, EXPERTS = 3, 5
PLACES = [0, 2, 3]
"""Of the gate's experts among those of the model."""
SETTINGS = GateConfig(balance_loss=0.5, z_loss=0.25, routing_loss=2.0)
TARGETS = torch.tensor([2, 0, -100, 1])
SHAPES = pytest.mark.parametrize("shape", [(4, GATED), (4, 6, GATED)], ids=["row", "token"])


def random_logits(shape, *, seed):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mask(shape):
    """[N, S] padding on the right, for logits per token."""
    return (torch.arange(6) < torch.tensor([[6], [1], [4], [3]])).long() if len(shape) == 3 else None


def told(logits, *, mask=None, top_k=2, settings=SETTINGS, **choice):
    """Route by these logits, one tensor a block, and tell what the gate did."""
    choose = Selection(top_k=top_k, **choice)
    routings = [choose(each, mask=mask, training=True).reindexed(PLACES, num_experts=EXPERTS) for each in logits]
    return auxiliary_losses(
        routings,
        experts=PLACES,
        num_experts=EXPERTS,
        settings=settings,
        top_k=top_k,
        targets=TARGETS,
        mask=mask,
    )


@SHAPES
def test_the_losses_are_those_of_losses_py_averaged_over_blocks(shape):
    blocks, mask = [random_logits(shape, seed=seed) for seed in range(3)], random_mask(shape)
    found = told(blocks, mask=mask)
    expected = {
        "balance": [load_balancing_loss(logits, top_k=2, mask=mask) for logits in blocks],
        "z": [z_loss(logits, mask=mask) for logits in blocks],
        "routing": [routing_cross_entropy(logits, TARGETS, mask=mask) for logits in blocks],
    }
    means = {name: torch.stack(values).mean().item() for name, values in expected.items()}
    assert found.losses == pytest.approx({**means, "dropped": 0.0}, rel=1e-6)
    assert found.total.item() == pytest.approx(
        0.5 * means["balance"] + 0.25 * means["z"] + 2.0 * means["routing"], rel=1e-6
    )


@SHAPES
def test_usage_is_the_share_of_the_weight_of_real_tokens_and_sums_to_one(shape):
    blocks, mask = [random_logits(shape, seed=seed) for seed in range(2)], random_mask(shape)
    shares = torch.zeros(2, GATED, dtype=torch.float64)
    for block, logits in enumerate(blocks):
        weights = Selection(top_k=2)(logits)
        real = mask.bool().flatten() if mask is not None else torch.ones(4, dtype=torch.bool)
        for place in range(GATED):
            shares[block, place] = weights.weights_of(place).flatten()[real].double().sum()
        shares[block] /= shares[block].sum()
    usage = told(blocks, mask=mask).usage
    torch.testing.assert_close(usage.double(), shares.mean(0), atol=1e-6, rtol=0)
    assert usage.sum().item() == pytest.approx(1, abs=1e-6)


def test_padding_never_counts():
    mask, shape = random_mask((4, 6, GATED)), (4, 6, GATED)
    logits = random_logits(shape, seed=0)
    other = torch.where(mask.unsqueeze(-1).bool(), logits, 10 * random_logits(shape, seed=1))
    one, same = told([logits], mask=mask, capacity=0.5), told([other], mask=mask, capacity=0.5)
    assert one.losses == same.losses
    assert torch.equal(one.usage, same.usage)
    assert one.losses["dropped"] > 0


def test_dropped_is_the_share_of_choices_that_found_their_expert_full():
    logits = torch.tensor([5.0, 0.0, -5.0]).expand(4, 6, GATED)
    mask = random_mask((4, 6, GATED))  # 14 real tokens, so 14 choices and 14 * 1.5 / 3 = 7 places
    found = told([logits], mask=mask, top_k=1, capacity=1.5)
    assert found.losses["dropped"] == pytest.approx(7 / 14)
    assert told([logits], mask=mask, top_k=1).losses["dropped"] == 0


def test_rows_that_no_expert_belongs_to_have_no_routing_loss():
    logits = random_logits((4, GATED), seed=0)
    routings = [Selection(top_k=2)(logits)]
    found = auxiliary_losses(
        routings,
        experts=range(GATED),
        num_experts=GATED,
        settings=SETTINGS,
        top_k=2,
        targets=torch.full((4,), -100),
    )
    assert found.losses["routing"] == 0


@SHAPES
@pytest.mark.parametrize("weight", ["balance_loss", "z_loss", "routing_loss"])
def test_the_gradient_of_each_loss_reaches_the_logits_by_its_weight(shape, weight):
    nothing = {"balance_loss": 0.0, "z_loss": 0.0, "routing_loss": 0.0}
    logits, gradients = random_logits(shape, seed=0).requires_grad_(), []
    for value in (0.0, 1.0, 3.0):
        logits.grad = None
        told([logits], mask=random_mask(shape), settings=GateConfig(**{**nothing, weight: value})).total.backward()
        gradients.append(logits.grad)
    assert not gradients[0].any()
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(gradients[2], 3 * gradients[1])


def test_usage_is_a_number_even_if_every_choice_was_dropped_or_turned_away():
    nothing = Routing(None, torch.zeros(2, 6, EXPERTS), torch.zeros(2, 6, GATED))
    found = auxiliary_losses(
        [nothing],
        experts=PLACES,
        num_experts=EXPERTS,
        settings=SETTINGS,
        top_k=2,
        targets=TARGETS[:2],
        mask=torch.ones(2, 6),
    )
    assert found.usage.tolist() == [0.0] * GATED
    assert found.total.isfinite()


# Alarms


def said(*shares, rows=None):
    names = [f"pool-{place}" for place in range(len(shares))]
    due = None if rows is None else dict(zip(names, rows, strict=False))
    return alarms(dict(zip(names, shares, strict=True)), rows=due, settings=GateConfig())


@pytest.mark.parametrize("shares", [(0.25, 0.25, 0.25, 0.25), (0.4, 0.3, 0.2, 0.1), (0.5, 0.5), (0.85, 0.15)])
def test_an_even_use_raises_no_alarm_and_an_uneven_one_only_if_it_is_extreme(shares):
    assert said(*shares) == []


def test_an_expert_that_is_hardly_used_is_named():
    (message,) = said(0.33, 0.33, 0.33, 0.01)
    assert message == (
        "Expert 'pool-3' got 1.0% of the weight, an even share is 25.0%: it is hardly used. Raise gate.balance_loss "
        "(now 0.01) or gate.jitter (now 0), or lower experts.pool."
    )


def test_an_expert_of_a_pool_that_takes_over_is_named():
    (message,) = said(0.8, 0.1, 0.06, 0.04)
    assert message.startswith("Expert 'pool-0' got 80.0% of the weight, an even share is 25.0%: the gate collapses.")
    assert len(said(0.96, 0.04)) == 2  # the one too much, the other hardly used


def test_a_task_may_use_its_own_expert_as_much_and_as_little_as_it_has_rows():
    assert said(0.8, 0.1, 0.06, 0.04, rows=(0.8, 0.1, 0.06, 0.04)) == []
    assert said(0.98, 0.01, 0.01, rows=(0.99, 0.01)) == []  # the third is not trained
    (message,) = said(0.98, 0.02, rows=(0.7, 0.3))
    assert message.startswith("Expert 'pool-1' got 2.0% of the weight, its task has 30.0% of the rows: it is hardly")
    assert "experts.pool" not in message


def test_only_choices_from_the_shortlist_count_for_balance():
    logits, shortlist = random_logits((4, 6, GATED), seed=5), torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0]])
    among = logits.gather(-1, shortlist.unsqueeze(1).expand(-1, 6, -1))
    inner = Selection(top_k=1)(among)
    routing = replace(inner, experts=shortlist, logits=logits).reindexed(PLACES, num_experts=EXPERTS)
    settings = GateConfig(temperature=2.0)
    found = auxiliary_losses(
        [routing], experts=PLACES, num_experts=EXPERTS, settings=settings, top_k=1, targets=TARGETS, mask=None
    )
    hits = torch.zeros(GATED)
    for row in range(4):
        for token in range(6):
            listed = shortlist[row].tolist()
            hits[max(listed, key=lambda expert: logits[row, token, expert].item())] += 1 / 24
    expected = GATED * (hits * (logits / 2.0).softmax(-1).mean((0, 1))).sum()
    assert found.losses["balance"] == pytest.approx(expected.item(), rel=1e-5)
