"""Gates without learned weights: what they promise about shares, seeds and equal texts."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import GateInput
from sparse_ft.prediction.baselines import (
    BernoulliGate,
    HashGate,
    LoadAwareGate,
    RandomGate,
    RoundRobinGate,
    UniformGate,
)

NAMES = ["sentiment", "topic", "intent"]
TEXTS = [f"text number {index} 你好" for index in range(600)]
MAKERS = {
    "uniform": UniformGate,
    "random": lambda names: RandomGate(names, seed=3),
    "round_robin": RoundRobinGate,
    "hash": HashGate,
    "load_aware": lambda names: LoadAwareGate(names, seed=3),
    "bernoulli": lambda names: BernoulliGate(names, seed=3, p=0.4),
}
ALL = pytest.mark.parametrize("kind", MAKERS)
ONE_EXPERT = [kind for kind in MAKERS if kind not in ("uniform", "bernoulli")]


def asked(texts):
    rows = len(texts)
    return GateInput(torch.zeros(rows, 2, 4), torch.ones(rows, 2, dtype=torch.long), 0, texts=list(texts))


def spread(routing, num_experts=3):
    return torch.cat([routing.weights_of(index) for index in range(num_experts)], -1)  # [N, E]


@ALL
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("names", [NAMES, ["alone"]], ids=["three", "one"])
def test_every_row_has_weights_that_sum_to_one(kind, rows, names):
    gate = MAKERS[kind](names)
    routing = gate.route(asked(TEXTS[:rows]))
    weights = spread(routing, len(names))
    assert weights.shape == (rows, len(names))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(rows))
    assert (weights >= 0).all()
    assert routing.logits is None
    assert gate.names == names
    assert gate.every_block is False


@ALL
def test_a_gate_made_anew_repeats_its_answers(kind):
    first, second = MAKERS[kind](NAMES), MAKERS[kind](NAMES)
    for start in (0, 5, 11):
        batch = asked(TEXTS[start : start + 5])
        assert torch.equal(spread(first.route(batch)), spread(second.route(batch)))


@pytest.mark.parametrize("kind", ["uniform", "hash"])
def test_these_give_a_text_the_same_answer_in_any_batch(kind):
    gate = MAKERS[kind](NAMES)
    together = spread(gate.route(asked(TEXTS[:20])))
    backwards = spread(gate.route(asked(TEXTS[19::-1])))
    assert torch.equal(backwards.flip(0), together)
    for row in range(20):
        assert torch.equal(spread(gate.route(asked(TEXTS[row : row + 1]))), together[row : row + 1])


@pytest.mark.parametrize("kind", ["random", "round_robin", "load_aware", "bernoulli"])
def test_these_do_not(kind):
    gate = MAKERS[kind](NAMES)
    answers = {tuple(spread(gate.route(asked(TEXTS[:1])))[0].tolist()) for _ in range(20)}
    assert len(answers) > 1


@pytest.mark.parametrize("kind", ONE_EXPERT)
def test_one_expert_a_row_and_all_experts_about_equally_often(kind):
    weights = spread(MAKERS[kind](NAMES).route(asked(TEXTS)))
    assert set(weights.flatten().tolist()) == {0.0, 1.0}
    counts = weights.sum(0)
    # 600 rows: a standard deviation of 11.5 for independent draws.
    assert (counts - 200).abs().max() <= {"round_robin": 0, "load_aware": 40}.get(kind, 50)


@pytest.mark.parametrize("kind", ["random", "load_aware", "bernoulli"])
def test_another_seed_gives_other_answers_and_the_global_one_is_left_alone(kind):
    other = {"random": RandomGate, "load_aware": LoadAwareGate}.get(kind)
    other = other(NAMES, seed=4) if other else BernoulliGate(NAMES, seed=4, p=0.4)
    before = torch.get_rng_state()
    assert not torch.equal(spread(MAKERS[kind](NAMES).route(asked(TEXTS))), spread(other.route(asked(TEXTS))))
    assert torch.equal(torch.get_rng_state(), before)


def test_round_robin_goes_on_where_the_batch_before_ended():
    gate = RoundRobinGate(NAMES)
    experts = [gate.route(asked(TEXTS[:rows])).experts.flatten().tolist() for rows in (2, 2, 5)]
    assert experts == [[0, 1], [2, 0], [1, 2, 0, 1, 2]]


def test_a_hash_is_the_same_in_another_process():
    code = (
        "import torch\nfrom sparse_ft.prediction.baselines import HashGate\n"
        "from sparse_ft.experts.gates import GateInput\n"
        "texts = [f'text number {index} 你好' for index in range(20)]\n"
        f"inputs = GateInput(torch.zeros(20, 1, 1), torch.ones(20, 1), 0, texts=texts)\n"
        f"print(HashGate({NAMES!r}).route(inputs).experts.flatten().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.strip() == str(HashGate(NAMES).route(asked(TEXTS[:20])).experts.flatten().tolist())


def test_a_hash_takes_half_a_surrogate_pair():
    assert HashGate(NAMES).route(asked(["\ud83d", ""])).experts.shape == (2, 1)


@pytest.mark.parametrize("texts", [[], ["one"]])
def test_a_hash_without_the_texts_is_refused(texts):
    inputs = GateInput(torch.zeros(2, 1, 4), torch.ones(2, 1), 0, texts=texts)
    with pytest.raises(ConfigError, match=rf"needs the text of each row and got {len(texts)} texts for 2 rows\. Give"):
        HashGate(NAMES).route(inputs)


def test_the_load_decides_how_probable_an_expert_is():
    gate = LoadAwareGate(NAMES, seed=0)
    gate.route(asked(TEXTS))
    assert gate.load.sum() == 600
    first = Counter()
    for seed in range(600):
        gate = LoadAwareGate(NAMES, seed=seed)
        gate.load = torch.tensor([0.0, 1.0, 5.0])  # 1, 1/2 and 1/6: shares of 0.6, 0.3 and 0.1
        first.update(gate.route(asked(TEXTS[:1])).experts.flatten().tolist())
    assert [first[index] / 600 for index in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.06)


@pytest.mark.parametrize("p", [0.01, 0.4, 1.0])
def test_bernoulli_draws_each_expert_alone_with_equal_weights_and_at_least_one(p):
    weights = spread(BernoulliGate(NAMES, seed=0, p=p).route(asked(TEXTS)))
    numbers = (weights > 0).sum(-1, keepdim=True)
    assert (numbers >= 1).all()
    torch.testing.assert_close(weights, (weights > 0) / numbers)
    share = p + (1 - p) ** 3 / 3  # drawn, or the spare of a row without any
    assert (weights > 0).float().mean(0).tolist() == pytest.approx([share] * 3, abs=0.08)


@pytest.mark.parametrize("p", [0, -0.5, 1.01, float("nan")])
def test_a_p_that_is_no_probability_is_refused(p):
    with pytest.raises(ConfigError, match=r"got p=.*; give a probability above 0 and at most 1"):
        BernoulliGate(NAMES, seed=0, p=p)


@ALL
def test_no_expert_at_all_is_refused(kind):
    with pytest.raises(ConfigError, match="needs at least one expert to choose and got none"):
        MAKERS[kind]([])
