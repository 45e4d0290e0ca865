"""Baselines that choose experts for texts: what they promise about shares, seeds and equal texts."""

from collections import Counter

import pytest
import torch

from sparse_ft.errors import ConfigError
from sparse_ft.prediction.baselines import (
    BernoulliChooser,
    HashChooser,
    LoadAwareChooser,
    RandomChooser,
    RoundRobinChooser,
    UniformChooser,
)

TEXTS = [f"text number {index} 你好" for index in range(600)]
MAKERS = {
    "uniform": UniformChooser,
    "random": lambda number: RandomChooser(number, seed=3),
    "round_robin": RoundRobinChooser,
    "hash": HashChooser,
    "load_aware": lambda number: LoadAwareChooser(number, seed=3),
    "bernoulli": lambda number: BernoulliChooser(number, seed=3, p=0.4),
}
ALL = pytest.mark.parametrize("kind", MAKERS)
ONE_EXPERT = [kind for kind in MAKERS if kind not in ("uniform", "bernoulli")]


def spread(routing, num_experts=3):
    return torch.cat([routing.weights_of(index) for index in range(num_experts)], -1)  # [N, E]


@ALL
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("number", [3, 1])
def test_every_row_has_weights_that_sum_to_one(kind, rows, number):
    chooser = MAKERS[kind](number)
    routing = chooser.choose(TEXTS[:rows])
    weights = spread(routing, number)
    assert weights.shape == (rows, number)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(rows))
    assert (weights >= 0).all()
    assert routing.logits is None


@ALL
def test_a_chooser_made_anew_repeats_its_answers(kind):
    first, second = MAKERS[kind](3), MAKERS[kind](3)
    for start in (0, 5, 11):
        batch = TEXTS[start : start + 5]
        assert torch.equal(spread(first.choose(batch)), spread(second.choose(batch)))


@pytest.mark.parametrize("kind", ["uniform", "hash"])
def test_these_give_a_text_the_same_answer_in_any_batch(kind):
    chooser = MAKERS[kind](3)
    together = spread(chooser.choose(TEXTS[:20]))
    backwards = spread(chooser.choose(TEXTS[19::-1]))
    assert torch.equal(backwards.flip(0), together)
    for row in range(20):
        assert torch.equal(spread(chooser.choose(TEXTS[row : row + 1])), together[row : row + 1])


@pytest.mark.parametrize("kind", ["random", "round_robin", "load_aware", "bernoulli"])
def test_these_do_not(kind):
    chooser = MAKERS[kind](3)
    answers = {tuple(spread(chooser.choose(TEXTS[:1]))[0].tolist()) for _ in range(20)}
    assert len(answers) > 1


@pytest.mark.parametrize("kind", ONE_EXPERT)
def test_one_expert_a_row_and_all_experts_about_equally_often(kind):
    weights = spread(MAKERS[kind](3).choose(TEXTS))
    assert set(weights.flatten().tolist()) == {0.0, 1.0}
    counts = weights.sum(0)
    # 600 rows: a standard deviation of 11.5 for independent draws.
    assert (counts - 200).abs().max() <= {"round_robin": 0, "load_aware": 40}.get(kind, 50)


@pytest.mark.parametrize("kind", ["random", "load_aware", "bernoulli"])
def test_another_seed_gives_other_answers_and_the_global_one_is_left_alone(kind):
    other = {"random": RandomChooser, "load_aware": LoadAwareChooser}.get(kind)
    other = other(3, seed=4) if other else BernoulliChooser(3, seed=4, p=0.4)
    before = torch.get_rng_state()
    assert not torch.equal(spread(MAKERS[kind](3).choose(TEXTS)), spread(other.choose(TEXTS)))
    assert torch.equal(torch.get_rng_state(), before)


def test_round_robin_goes_on_where_the_batch_before_ended():
    chooser = RoundRobinChooser(3)
    experts = [chooser.choose(TEXTS[:rows]).experts.flatten().tolist() for rows in (2, 2, 5)]
    assert experts == [[0, 1], [2, 0], [1, 2, 0, 1, 2]]


def test_a_hash_takes_half_a_surrogate_pair():
    assert HashChooser(3).choose(["\ud83d", ""]).experts.shape == (2, 1)


def test_the_load_decides_how_probable_an_expert_is():
    chooser = LoadAwareChooser(3, seed=0)
    chooser.choose(TEXTS)
    assert chooser.load.sum() == 600
    first = Counter()
    for seed in range(600):
        chooser = LoadAwareChooser(3, seed=seed)
        chooser.load = torch.tensor([0.0, 1.0, 5.0])  # 1, 1/2 and 1/6: shares of 0.6, 0.3 and 0.1
        first.update(chooser.choose(TEXTS[:1]).experts.flatten().tolist())
    assert [first[index] / 600 for index in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.06)


@pytest.mark.parametrize("p", [0.01, 0.4, 1.0])
def test_bernoulli_draws_each_expert_alone_with_equal_weights_and_at_least_one(p):
    weights = spread(BernoulliChooser(3, seed=0, p=p).choose(TEXTS))
    numbers = (weights > 0).sum(-1, keepdim=True)
    assert (numbers >= 1).all()
    torch.testing.assert_close(weights, (weights > 0) / numbers)
    share = p + (1 - p) ** 3 / 3  # drawn, or the spare of a row without any
    assert (weights > 0).float().mean(0).tolist() == pytest.approx([share] * 3, abs=0.08)


@pytest.mark.parametrize("p", [0, -0.5, 1.01, float("nan")])
def test_a_p_that_is_no_probability_is_refused(p):
    with pytest.raises(ConfigError, match=r"got p=.*; give a probability above 0 and at most 1"):
        BernoulliChooser(3, seed=0, p=p)
