"""Losses of a gate against loops, transformers' own and finite differences; use of the experts; alarms."""

import math
from dataclasses import replace

import pytest
import torch

from sparse_ft.config import GateConfig
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection
from sparse_ft.training.gate_losses import alarms, auxiliary_losses, load_balancing_loss, routing_cross_entropy, z_loss

GATED, EXPERTS = 3, 5
INDICES = [0, 2, 3]
"""Of the gate's experts among those of the model."""
SETTINGS = GateConfig(balance_loss=0.5, z_loss=0.25, routing_loss=2.0)
TARGETS = torch.tensor([2, 0, -100, 1])
SHAPES = pytest.mark.parametrize("shape", [(4, GATED), (4, 6, GATED)], ids=["row", "token"])


LOSS_SHAPES = pytest.mark.parametrize("shape", [(7, EXPERTS), (3, 6, EXPERTS)], ids=["row", "token"])
LOSSES = pytest.mark.parametrize("name", ["load_balancing", "z", "cross_entropy"])


def random_logits(shape, *, seed=0, dtype=torch.float32):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def token_mask(shape):
    """[N, S] padding on the right, for logits per token."""
    return (torch.arange(6) < torch.tensor([[6], [1], [4], [3]])).long() if len(shape) == 3 else None


def report_of(logits, *, mask=None, top_k=2, settings=SETTINGS, **choice):
    """Route by these logits, one tensor a block, and report what the gate did."""
    choose = Selection(top_k=top_k, **choice)
    routings = [choose(each, mask=mask, training=True).reindexed(INDICES, num_experts=EXPERTS) for each in logits]
    return auxiliary_losses(
        routings,
        experts=INDICES,
        num_experts=EXPERTS,
        settings=settings,
        top_k=top_k,
        targets=TARGETS,
        mask=mask,
    )


@SHAPES
def test_the_losses_of_a_pass_are_averaged_over_its_blocks(shape):
    blocks, mask = [random_logits(shape, seed=seed) for seed in range(3)], token_mask(shape)
    report = report_of(blocks, mask=mask)
    expected = {
        "balance": [load_balancing_loss(logits, top_k=2, mask=mask) for logits in blocks],
        "z": [z_loss(logits, mask=mask) for logits in blocks],
        "routing": [routing_cross_entropy(logits, TARGETS, mask=mask) for logits in blocks],
    }
    means = {name: torch.stack(values).mean().item() for name, values in expected.items()}
    assert report.losses == pytest.approx({**means, "dropped": 0.0}, rel=1e-6)
    assert report.total.item() == pytest.approx(
        0.5 * means["balance"] + 0.25 * means["z"] + 2.0 * means["routing"], rel=1e-6
    )


@SHAPES
def test_usage_is_the_share_of_the_weight_of_real_tokens_and_sums_to_one(shape):
    blocks, mask = [random_logits(shape, seed=seed) for seed in range(2)], token_mask(shape)
    shares = torch.zeros(2, GATED, dtype=torch.float64)
    for block, logits in enumerate(blocks):
        weights = Selection(top_k=2)(logits)
        real = mask.bool().flatten() if mask is not None else torch.ones(4, dtype=torch.bool)
        for expert in range(GATED):
            shares[block, expert] = weights.weights_of(expert).flatten()[real].double().sum()
        shares[block] /= shares[block].sum()
    usage = report_of(blocks, mask=mask).usage
    torch.testing.assert_close(usage.double(), shares.mean(0), atol=1e-6, rtol=0)
    assert usage.sum().item() == pytest.approx(1, abs=1e-6)


def test_padding_never_counts():
    mask, shape = token_mask((4, 6, GATED)), (4, 6, GATED)
    logits = random_logits(shape, seed=0)
    other = torch.where(mask.unsqueeze(-1).bool(), logits, 10 * random_logits(shape, seed=1))
    one, same = report_of([logits], mask=mask, capacity=0.5), report_of([other], mask=mask, capacity=0.5)
    assert one.losses == same.losses
    assert torch.equal(one.usage, same.usage)
    assert one.losses["dropped"] > 0


def test_dropped_is_the_share_of_choices_that_found_their_expert_full():
    logits = torch.tensor([5.0, 0.0, -5.0]).expand(4, 6, GATED)
    mask = token_mask((4, 6, GATED))  # 14 real tokens, so 14 choices and 14 * 1.5 / 3 = 7 rows that fit
    report = report_of([logits], mask=mask, top_k=1, capacity=1.5)
    assert report.losses["dropped"] == pytest.approx(7 / 14)
    assert report_of([logits], mask=mask, top_k=1).losses["dropped"] == 0


@SHAPES
@pytest.mark.parametrize("weight", ["balance_loss", "z_loss", "routing_loss"])
def test_the_gradient_of_each_loss_reaches_the_logits_by_its_weight(shape, weight):
    nothing = {"balance_loss": 0.0, "z_loss": 0.0, "routing_loss": 0.0}
    logits, gradients = random_logits(shape, seed=0).requires_grad_(), []
    for value in (0.0, 1.0, 3.0):
        logits.grad = None
        report_of([logits], mask=token_mask(shape), settings=GateConfig(**{**nothing, weight: value})).total.backward()
        gradients.append(logits.grad)
    assert not gradients[0].any()
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(gradients[2], 3 * gradients[1])


def test_usage_is_a_number_even_if_every_choice_was_dropped_or_turned_away():
    nothing = Routing(None, torch.zeros(2, 6, EXPERTS), torch.zeros(2, 6, GATED))
    report = auxiliary_losses(
        [nothing],
        experts=INDICES,
        num_experts=EXPERTS,
        settings=SETTINGS,
        top_k=2,
        targets=TARGETS[:2],
        mask=torch.ones(2, 6),
    )
    assert report.usage.tolist() == [0.0] * GATED
    assert report.total.isfinite()


# Alarms


@pytest.mark.parametrize(("shares", "rows", "alarming"), [
    ((0.25, 0.25, 0.25, 0.25), None, {}),
    ((0.4, 0.3, 0.2, 0.1), None, {}),
    ((0.85, 0.15), None, {}),
    ((0.33, 0.33, 0.33, 0.01), None, {3: ["1.0%", "25.0%", "hardly used", "gate.balance_loss", "experts.pool"]}),
    ((0.8, 0.1, 0.06, 0.04), None, {0: ["80.0%", "25.0%", "collapses"]}),
    ((0.96, 0.04), None, {0: ["collapses"], 1: ["hardly used"]}),
    ((0.8, 0.1, 0.06, 0.04), (0.8, 0.1, 0.06, 0.04), {}),  # as much of its own expert as a task has rows
    ((0.98, 0.01, 0.01), (0.99, 0.01), {}),  # the third is not trained
    ((0.98, 0.02), (0.7, 0.3), {1: ["2.0%", "30.0% of the rows", "hardly"]}),
])  # fmt: skip
def test_extreme_use_raises_an_alarm_with_its_numbers(shares, rows, alarming):
    names = [f"pool-{index}" for index in range(len(shares))]
    due = None if rows is None else dict(zip(names, rows, strict=False))
    messages = alarms(dict(zip(names, shares, strict=True)), rows=due, settings=GateConfig())
    assert len(messages) == len(alarming)
    for message, (index, parts) in zip(messages, alarming.items(), strict=True):
        assert all(part in message for part in (f"'pool-{index}'", *parts))


def test_only_choices_from_the_shortlist_count_for_balance():
    logits, shortlist = random_logits((4, 6, GATED), seed=5), torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0]])
    among = logits.gather(-1, shortlist.unsqueeze(1).expand(-1, 6, -1))
    inner = Selection(top_k=1)(among)
    routing = replace(inner, experts=shortlist, logits=logits).reindexed(INDICES, num_experts=EXPERTS)
    settings = GateConfig(temperature=2.0)
    report = auxiliary_losses(
        [routing], experts=INDICES, num_experts=EXPERTS, settings=settings, top_k=1, targets=TARGETS, mask=None
    )
    hits = torch.zeros(GATED)
    for row in range(4):
        for token in range(6):
            listed = shortlist[row].tolist()
            hits[max(listed, key=lambda expert: logits[row, token, expert].item())] += 1 / 24
    expected = GATED * (hits * (logits / 2.0).softmax(-1).mean((0, 1))).sum()
    assert report.losses["balance"] == pytest.approx(expected.item(), rel=1e-5)


# Each loss


def random_mask(shape, *, seed=0):
    """[N, S] padding on the right; for logits per row some rows are nothing but padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = shape[1] if len(shape) == 3 else 4
    lengths = torch.randint(0, tokens + 1, (shape[0],), generator=generator)
    lengths[:2] = torch.tensor([0, tokens])
    return (torch.arange(tokens) < lengths.unsqueeze(1)).long()


def compute(name, logits, *, mask=None):
    if name == "load_balancing":
        return load_balancing_loss(logits, top_k=2, mask=mask)
    if name == "z":
        return z_loss(logits, mask=mask)
    targets = torch.arange(len(logits)) % EXPERTS
    return routing_cross_entropy(logits, targets, mask=mask)


def real_decisions(logits, mask):
    """The logits that count, as lists of floats."""
    if mask is None:
        return logits.flatten(0, -2).tolist()
    kept = mask.bool() if logits.dim() == 3 else mask.bool().any(-1)
    return logits[kept].tolist()


def softmax(logits):
    exponentials = [math.exp(value) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


# Against loops.


@LOSS_SHAPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_load_balancing_is_the_share_of_choices_times_the_mean_probability(shape, masked, top_k):
    logits = random_logits(shape)
    mask = random_mask(shape) if masked else None
    rows = real_decisions(logits, mask)
    share, probability = [0.0] * EXPERTS, [0.0] * EXPERTS
    for row in rows:
        for index in sorted(range(EXPERTS), key=lambda index: -row[index])[:top_k]:
            share[index] += 1 / (top_k * len(rows))
        for index, value in enumerate(softmax(row)):
            probability[index] += value / len(rows)
    expected = EXPERTS * sum(left * right for left, right in zip(share, probability, strict=True))
    assert load_balancing_loss(logits, top_k=top_k, mask=mask).item() == pytest.approx(expected, rel=1e-5)


@LOSS_SHAPES
@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_is_the_mean_square_of_the_log_of_the_sum(shape, masked):
    logits = random_logits(shape)
    mask = random_mask(shape) if masked else None
    squares = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in real_decisions(logits, mask)]
    assert z_loss(logits, mask=mask).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


@LOSS_SHAPES
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_is_the_mean_surprise_at_the_right_expert(shape, masked):
    logits = random_logits(shape)
    mask = random_mask(shape) if masked else None
    targets = torch.randint(0, EXPERTS, shape[:-1], generator=torch.Generator().manual_seed(3))
    targets.view(-1)[-2] = -100
    kept = torch.ones(shape[:-1], dtype=torch.bool)
    if masked:
        kept = mask.bool() if len(shape) == 3 else mask.bool().any(-1)
    kept &= targets != -100
    surprises = [
        -math.log(softmax(row)[target])
        for row, target in zip(logits[kept].tolist(), targets[kept].tolist(), strict=True)
    ]
    expected = sum(surprises) / len(surprises)
    assert routing_cross_entropy(logits, targets, mask=mask).item() == pytest.approx(expected, rel=1e-5)


def test_one_target_a_row_holds_for_each_of_its_tokens():
    logits = random_logits((3, 6, EXPERTS))
    mask, targets = random_mask((3, 6, EXPERTS)), torch.tensor([1, 4, -100])
    each = targets.unsqueeze(1).expand(3, 6)
    assert torch.equal(
        routing_cross_entropy(logits, targets, mask=mask), routing_cross_entropy(logits, each, mask=mask)
    )


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_is_mixtrals_divided_by_the_number_of_choices(top_k, masked):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = random_logits((3, 6, EXPERTS))
    mask = random_mask(logits.shape) if masked else None
    theirs = load_balancing_loss_func((logits.view(-1, EXPERTS),), EXPERTS, top_k, mask) / top_k
    torch.testing.assert_close(load_balancing_loss(logits, top_k=top_k, mask=mask), theirs)


def test_the_switch_losses_of_transformers_are_the_same():
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func,
        router_z_loss_func,
    )

    logits = random_logits((1, 12, EXPERTS))  # theirs takes the shares of each text alone
    best = logits.argmax(-1)
    theirs = load_balancing_loss_func(logits.softmax(-1), best)
    torch.testing.assert_close(load_balancing_loss(logits), theirs)
    torch.testing.assert_close(load_balancing_loss(logits, experts=best.unsqueeze(-1)), theirs)
    torch.testing.assert_close(z_loss(logits), router_z_loss_func(logits))


# What the scores mean.


def test_uniform_routing_scores_one_and_specialised_routing_by_the_tasks_of_the_batch():
    for top_k in (1, 2, 4):
        assert load_balancing_loss(torch.zeros(8, 4), top_k=top_k).item() == pytest.approx(1)
    sure = 30 * torch.eye(4)
    assert load_balancing_loss(sure[[2] * 8]).item() == pytest.approx(4)
    assert load_balancing_loss(sure.repeat(2, 1)).item() == pytest.approx(1)
    tokens, mask = sure[[0, 1, 2, 3, 3, 3]].view(1, 6, 4), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert load_balancing_loss(tokens, mask=mask).item() == pytest.approx(1)
    assert load_balancing_loss(tokens).item() == pytest.approx(4 * (3 / 36 + 9 / 36))


def test_given_experts_count_in_place_of_the_largest_logits():
    logits = random_logits((7, EXPERTS))
    best = logits.topk(2, -1).indices
    assert torch.equal(load_balancing_loss(logits, experts=best), load_balancing_loss(logits, top_k=2))
    everyone_the_last = load_balancing_loss(logits, experts=torch.full((7, 1), EXPERTS - 1))
    torch.testing.assert_close(everyone_the_last, EXPERTS * logits.softmax(-1)[:, -1].mean())


# Padding, precision, gradients.


@LOSSES
@LOSS_SHAPES
@pytest.mark.parametrize("filling", [1e4, math.inf, math.nan])
def test_padding_does_not_count_whatever_it_holds(name, shape, filling):
    logits, mask = random_logits(shape), random_mask(shape)
    real = (mask.bool() if len(shape) == 3 else mask.bool().any(-1)).unsqueeze(-1)
    dirty = torch.where(real, logits, filling).requires_grad_()
    clean = logits.clone().requires_grad_()
    got, expected = compute(name, dirty, mask=mask), compute(name, clean, mask=mask)
    assert torch.equal(got, expected)
    got.backward()
    expected.backward()
    assert torch.equal(dirty.grad, clean.grad)
    assert not torch.where(real, 0.0, dirty.grad).any()


@LOSSES
@LOSS_SHAPES
def test_a_batch_without_any_real_token_gives_zero(name, shape):
    logits = random_logits(shape).requires_grad_()
    loss = compute(name, logits, mask=torch.zeros_like(random_mask(shape)))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@LOSSES
@LOSS_SHAPES
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(name, shape, masked):
    logits = random_logits(shape, dtype=torch.float64).requires_grad_()
    mask = random_mask(shape) if masked else None
    assert compute(name, logits, mask=mask).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda values: compute(name, values, mask=mask), [logits])


@LOSSES
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_logits_are_computed_in_float32(name, autocast):
    logits = random_logits((3, 6, EXPERTS)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = compute(name, logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, compute(name, logits.float()))
