"""Auxiliary losses against loops in float64, transformers' own, and finite differences."""

import math

import pytest
import torch

from sparse_ft.training.gate_losses import load_balancing_loss, routing_cross_entropy, z_loss

EXPERTS = 5
SHAPES = pytest.mark.parametrize("shape", [(7, EXPERTS), (3, 6, EXPERTS)], ids=["row", "token"])
LOSSES = pytest.mark.parametrize("name", ["load_balancing", "z", "cross_entropy"])


def random_logits(shape, *, seed=0, dtype=torch.float32):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


@SHAPES
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


@SHAPES
@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_is_the_mean_square_of_the_log_of_the_sum(shape, masked):
    logits = random_logits(shape)
    mask = random_mask(shape) if masked else None
    squares = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in real_decisions(logits, mask)]
    assert z_loss(logits, mask=mask).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


@SHAPES
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


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_uniform_routing_scores_one(top_k):
    assert load_balancing_loss(torch.zeros(8, 4), top_k=top_k).item() == pytest.approx(1)


def test_specialised_routing_scores_the_number_of_experts_on_one_task_and_one_on_a_mixed_batch():
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


def test_descent_evens_out_a_collapsed_gate():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]]).repeat(16, 1).add(0.1 * random_logits((16, 4))).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    before = load_balancing_loss(logits).item()
    for _ in range(100):
        optimizer.zero_grad()
        load_balancing_loss(logits).backward()
        optimizer.step()
    assert before > 1.5
    assert load_balancing_loss(logits).item() < 1.2


# Padding, precision, gradients.


@LOSSES
@SHAPES
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
@SHAPES
def test_a_batch_without_any_real_token_gives_zero(name, shape):
    logits = random_logits(shape).requires_grad_()
    loss = compute(name, logits, mask=torch.zeros_like(random_mask(shape)))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_targets_that_all_do_not_count_give_zero():
    assert routing_cross_entropy(random_logits((7, EXPERTS)), torch.full((7,), -100)).item() == 0


@LOSSES
@SHAPES
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
