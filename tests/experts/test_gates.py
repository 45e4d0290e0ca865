"""Gates: choosing from logits against a loop in float64, and what each gate answers."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from sparse_ft.experts.gates import (
    GateInput,
    PrototypeGate,
    SequenceGate,
    TokenGate,
    build_gate,
    describe_gate,
)
from sparse_ft.experts.selection import Selection, within_capacity
from sparse_ft.prediction.arrow import ArrowGate

EXPERTS, HIDDEN = 6, 8
SHAPES = pytest.mark.parametrize("shape", [(5, EXPERTS), (3, 4, EXPERTS)], ids=["row", "token"])


def random_logits(shape, *, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_input(*, rows=4, tokens=5, block=0, seed=0):
    """Hidden states with padding that is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, HIDDEN, generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, tokens - row % tokens :] = 0
    return GateInput(torch.where(mask.unsqueeze(-1).bool(), hidden, 1e3), mask, block)


def spread(routing, num_experts=EXPERTS):
    """The weight of every expert, [N, E] or [N, S, E]."""
    return torch.stack([routing.weights_of(index) for index in range(num_experts)], -1).squeeze(
        () if routing.by_token else 1
    )


def chosen_by_loop(logits, choice):
    """One decision in plain Python floats: expert to weight."""
    exponentials = [math.exp(logit / choice.temperature) for logit in logits]
    probabilities = [value / sum(exponentials) for value in exponentials]
    if max(probabilities) < choice.min_confidence:
        return {}
    best = sorted(range(len(logits)), key=lambda index: -logits[index])[: choice.top_k]
    kept, total = [], 0.0
    for index in best:
        if choice.top_p is None or total < choice.top_p:
            kept.append(index)
        total += probabilities[index]
    share = sum(probabilities[index] for index in kept) if choice.normalise else 1.0
    return {index: probabilities[index] / share for index in kept}


# Choosing from logits.


@SHAPES
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("rest", [
    {},
    {"normalise": False},
    {"temperature": 0.3},
    {"top_p": 0.7},
    {"top_p": 0.9, "temperature": 3.0},
    {"min_confidence": 0.6},
])  # fmt: skip
def test_a_choice_is_that_of_a_loop_in_float64(shape, top_k, rest):
    choice = Selection(top_k=top_k, **rest)
    logits = random_logits(shape, seed=top_k)
    routing = choice(logits)
    expected = torch.zeros(shape, dtype=torch.float64).flatten(0, -2)
    for place, row in enumerate(logits.flatten(0, -2).double().tolist()):
        for index, weight in chosen_by_loop(row, choice).items():
            expected[place, index] = weight
    torch.testing.assert_close(spread(routing).double(), expected.view(shape), atol=1e-6, rtol=1e-5)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, logits)
    assert (routing.experts is None) == routing.by_token == (len(shape) == 3)


def test_top_p_takes_as_many_experts_as_it_needs():
    logits = torch.tensor([[0.6, 0.25, 0.1, 0.05], [0.97, 0.01, 0.01, 0.01]]).log()
    for top_p, numbers in [(0.5, [1, 1]), (0.7, [2, 1]), (0.9, [3, 1]), (0.975, [4, 2]), (0.0, [1, 1])]:
        assert (Selection(top_k=4, top_p=top_p)(logits).weights > 0).sum(-1).tolist() == numbers
    assert (Selection(top_k=2, top_p=0.975)(logits).weights > 0).sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_low_precision_are_weighed_in_float32(dtype):
    logits = random_logits((50, EXPERTS)).to(dtype)
    routing = Selection(top_k=2)(logits)
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    assert torch.equal(routing.weights, Selection(top_k=2)(logits.float()).weights)


def test_jitter_shakes_what_a_token_gate_reads_in_training_only_and_within_its_bounds():
    hidden = random_logits((4, 6, 8))
    shaken = Selection(jitter=0.1).jittered(hidden)
    assert not torch.equal(shaken, hidden)
    assert ((shaken - hidden).abs() <= 0.1 * hidden.abs() + 1e-6).all()
    assert torch.equal(Selection().jittered(hidden), hidden)
    gate = TokenGate(["a", "b", "c"], 8, blocks=[2], selection=Selection(top_k=3, jitter=0.1))
    gate.initialise(torch.Generator().manual_seed(0))
    inputs = GateInput(hidden, torch.ones(4, 6), 2)
    first, second = gate.train().route(inputs), gate.route(inputs)
    assert not torch.equal(first.weights, second.weights)
    assert torch.equal(gate.eval().route(inputs).weights, gate.route(inputs).weights)


def test_the_gradient_reaches_the_chosen_logits_unless_one_expert_stands_alone():
    logits = random_logits((4, EXPERTS)).requires_grad_()
    ones = torch.arange(1.0, 3.0)
    for choice, flows in [(Selection(top_k=2), True), (Selection(top_k=1), False), (Selection(normalise=False), True)]:
        logits.grad = None
        (choice(logits).weights * ones[: choice.top_k]).sum().backward()
        assert bool((logits.grad.abs() > 1e-6).any()) == flows
        assert logits.grad.isfinite().all()


# Capacity.


def within_capacity_by_loop(experts, weights, num_experts, *, factor, mask):
    """Walk through the batch in order and give each choice a place while there are any."""
    real = [
        (index, choice)
        for index in range(len(experts))
        for choice in range(len(experts[index]))
        if mask[index] and weights[index][choice] > 0
    ]
    places, used = max(1.0, len(real) * factor / num_experts), [0] * num_experts
    kept = [list(row) for row in weights]
    for index, choice in real:
        used[experts[index][choice]] += 1
        if used[experts[index][choice]] > places:
            kept[index][choice] = 0.0
    return kept


@pytest.mark.parametrize("factor", [0.5, 1.25, 100.0])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shape", [(16,), (4, 9)], ids=["row", "token"])
def test_capacity_drops_the_last_of_the_batch_and_padding_takes_no_place(factor, top_k, shape):
    generator = torch.Generator().manual_seed(top_k)
    weights, experts = torch.rand((*shape, EXPERTS), generator=generator).pow(3).topk(top_k, -1)
    weights = torch.where(torch.rand(weights.shape, generator=generator) < 0.2, 0.0, weights)
    mask = (torch.rand(shape, generator=generator) < 0.7).long()
    got = within_capacity(experts, weights, EXPERTS, factor=factor, mask=mask)
    expected = within_capacity_by_loop(
        experts.flatten(0, -2).tolist(),
        weights.flatten(0, -2).tolist(),
        EXPERTS,
        factor=factor,
        mask=mask.flatten().tolist(),
    )
    torch.testing.assert_close((got * mask.unsqueeze(-1)).flatten(0, -2), torch.tensor(expected) * mask.view(-1, 1))
    other = torch.where(mask.unsqueeze(-1).bool(), experts, (experts + 1) % EXPERTS)  # padding chooses otherwise
    again = within_capacity(other, weights, EXPERTS, factor=factor, mask=mask)
    assert torch.equal(again * mask.unsqueeze(-1), got * mask.unsqueeze(-1))
    if factor == 100:
        assert torch.equal(got, weights)


def test_a_share_that_is_a_whole_number_is_not_rounded_down():
    kept = within_capacity(torch.zeros(35, 1, dtype=torch.long), torch.ones(35, 1), 3, factor=1.2)
    assert int((kept > 0).sum()) == 14  # 35 * 1.2 / 3


def test_capacity_counts_in_training_only():
    logits = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    choice = Selection(capacity=1.0)
    assert choice(logits, training=True).weights.flatten().tolist() == [1.0] * 4 + [0.0] * 4
    assert choice(logits).weights.flatten().tolist() == [1.0] * 8
    tokens, mask = logits.view(2, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    kept = choice(tokens, mask=mask, training=True).weights[..., 0] * mask
    assert kept.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


# Gates.


BLOCKS = 3
TEXT_KINDS = pytest.mark.parametrize("kind", [SequenceGate, PrototypeGate])


def random_means(rows=20, *, seed=0):
    """Means of what enters BLOCKS blocks, with features of unlike size and place."""
    means = torch.randn(rows, BLOCKS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return 5 + means * torch.logspace(-2, 2, HIDDEN)


def random_text_gate(kind):
    names = [f"e{index}" for index in range(EXPERTS)]
    gate = kind(names, HIDDEN, block=BLOCKS - 1, selection=Selection(top_k=2)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in gate.classifier.parameters():
        parameter.normal_(generator=generator)
    gate.standardise(random_means(200, seed=2))
    return gate


@TEXT_KINDS
def test_a_fresh_text_gate_prefers_nobody(kind):
    gate = kind(["a", "b", "c"], HIDDEN, block=BLOCKS - 1, selection=Selection(top_k=3))
    torch.testing.assert_close(gate.decide(random_means(4), [[1, 2]] * 4).weights, torch.full((4, 3), 1 / 3))


@TEXT_KINDS
def test_a_text_gate_classifies_the_standardised_means_of_all_its_blocks(kind):
    gate, seen, means = random_text_gate(kind), random_means(200, seed=2).double(), random_means().double()
    features = ((means - seen.mean(0)) / seen.std(0, correction=0)).flatten(1)
    expected = copy.deepcopy(gate.classifier).double()(features)
    got = gate.decide(means.float(), [[1, 2]] * len(means)).logits
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gate.top_block_features(features), features.view(-1, BLOCKS, HIDDEN)[:, -1])


@TEXT_KINDS
def test_excluded_experts_are_never_chosen_and_a_constant_feature_does_no_harm(kind):
    gate, means = random_text_gate(kind), random_means()
    routing = gate.decide(means, [[1, 2]] * len(means), excluded=[0, 3])
    assert not torch.isin(routing.experts, torch.tensor([0, 3])).any()
    gate.standardise(torch.ones(5, BLOCKS, HIDDEN))
    assert gate.decide(means, [[1, 2]] * len(means)).logits.isfinite().all()


def clusters(num, rows, *, distance, seed):
    """Features of texts: one point cloud per expert, all stretched and turned alike, on a common offset."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    centers, turned = distance * torch.randn(num, 1, HIDDEN, generator=fixed), torch.randn(8, 8, generator=fixed)
    points = centers + torch.randn(num, rows, HIDDEN, generator=generator)
    return 5 + points @ turned * torch.logspace(-1, 1, HIDDEN)


def prototypes(clouds):
    gate = PrototypeGate([f"e{index}" for index in range(len(clouds))], HIDDEN, block=0, selection=Selection())
    gate.fit(list(clouds))
    return gate


def test_prototypes_are_linear_discriminant_analysis():
    clouds = [rows[: 40 + 30 * index] for index, rows in enumerate(clusters(3, 100, distance=1, seed=0))]
    centred = torch.cat([rows - rows.mean(0) for rows in clouds]).double().numpy()
    shrinkage = max(1e-3, ledoit_wolf_shrinkage(centred, assume_centered=True))
    covariance = sum(np.cov(rows.double().numpy().T, bias=True) for rows in clouds) / 3
    covariance = shrunk_covariance(covariance, shrinkage)
    means = np.stack([rows.double().numpy().mean(0) for rows in clouds])
    new = clusters(3, 50, distance=1, seed=1).view(150, HIDDEN)
    apart = new.double().numpy()[:, None] - means
    distances = np.einsum("nef,fg,neg->ne", apart, np.linalg.inv(covariance), apart)
    expected = torch.from_numpy(-distances / 2).softmax(-1)
    gate = prototypes(clouds)
    got = gate.decide(new.unsqueeze(1), [[1, 2]] * 150).logits.softmax(-1)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-2)

    class Shrunk:  # hands the same covariance to scikit-learn, whatever the class
        def fit(self, rows):
            self.covariance_ = covariance
            return self

    reference = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk(), priors=[1 / 3] * 3)
    reference.fit(torch.cat(clouds).double().numpy(), np.repeat(range(3), [len(rows) for rows in clouds]))
    torch.testing.assert_close(
        got.double(), torch.from_numpy(reference.predict_proba(new.double().numpy())), atol=1e-3, rtol=1e-2
    )


def test_one_text_is_enough_for_a_prototype():
    points = clusters(2, 1, distance=4, seed=0)
    routing = prototypes(points).decide(points, [[1, 2]] * 2)
    assert routing.logits.isfinite().all()
    assert routing.experts.flatten().tolist() == [0, 1]


@TEXT_KINDS
def test_text_gates_decide_in_float32_under_bf16_autocast_and_on_bf16_states(kind):
    gate, means = random_text_gate(kind), random_means().bfloat16()
    exact = gate.decide(means, [[1, 2]] * len(means))
    assert exact.weights.dtype == exact.logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = gate.decide(means.float(), [[1, 2]] * len(means))
    torch.testing.assert_close(again.logits, exact.logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["token", "arrow"])
def test_token_gates_choose_for_each_token_by_the_weights_of_their_block(kind):
    blocks, names = [1, 3], [f"e{index}" for index in range(EXPERTS)]
    if kind == "token":
        gate = TokenGate(names, HIDDEN, blocks=blocks, selection=Selection(top_k=2))
        gate.initialise(torch.Generator().manual_seed(0))
        matrices = {block: linear.weight for block, linear in zip(blocks, gate.linears, strict=True)}
    else:
        generator = torch.Generator().manual_seed(0)
        matrices = {block: torch.randn(EXPERTS, HIDDEN, generator=generator) for block in blocks}
        matrices = {block: torch.nn.functional.normalize(value, dim=-1) for block, value in matrices.items()}
        gate = ArrowGate(names, matrices, selection=Selection(top_k=2))
        assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert gate.blocks == list(blocks)
    answers = []
    for block in blocks:
        inputs = random_input(block=block)
        routing = gate.route(inputs)
        assert routing.by_token
        for row, tokens in enumerate(inputs.hidden.double()):
            for place, token in enumerate(tokens):
                logits = [float(vector @ token) for vector in matrices[block].detach().double()]
                logits = [abs(value) for value in logits] if kind == "arrow" else logits
                if inputs.attention_mask[row, place]:
                    expected = torch.zeros(EXPERTS)
                    for index, weight in chosen_by_loop(logits, gate.selection).items():
                        expected[index] = weight
                    torch.testing.assert_close(routing.weights[row, place], expected, atol=1e-5, rtol=1e-4)
        answers.append(routing.weights)
        assert torch.equal(gate.route(inputs).weights, routing.weights)
    assert not torch.equal(*answers)


def shortlisted(*, shortlist, experts=12, seed=0, **choice):
    """A token gate over many experts, sure enough of itself that texts differ in what they want."""
    names = [f"e{index}" for index in range(experts)]
    gate = TokenGate(names, HIDDEN, blocks=[0], selection=Selection(**choice), shortlist=shortlist)
    with torch.no_grad():
        gate.linears[0].weight.normal_(generator=torch.Generator().manual_seed(seed))
    return gate.eval()


@pytest.mark.parametrize("shortlist", [2, 5])
@pytest.mark.parametrize("choice", [{"top_k": 2}, {"top_k": 1, "normalise": False}, {"top_k": 2, "top_p": 0.6}])
def test_a_shortlist_is_as_if_the_other_logits_were_minus_infinity(shortlist, choice):
    gate, inputs = shortlisted(shortlist=shortlist, **choice), random_input(rows=6)
    routing = gate.route(inputs)
    assert routing.experts.shape == (6, shortlist)
    weight = gate.linears[0].weight.double()
    for row, hidden in enumerate(inputs.hidden):
        real = hidden[inputs.attention_mask[row].bool()].double()
        logits = real @ weight.T  # [S, E]
        wanted = logits.softmax(-1).mean(0)
        kept = sorted(range(12), key=lambda index: -wanted[index])[:shortlist]
        assert sorted(routing.experts[row].tolist()) == sorted(kept)
        for place, token in enumerate(logits.tolist()):
            among = [value if index in kept else -math.inf for index, value in enumerate(token)]
            expected = torch.zeros(12)
            for index, share in chosen_by_loop(among, gate.selection).items():
                expected[index] = share
            torch.testing.assert_close(routing.dense_weights(12)[row, place], expected, atol=1e-5, rtol=1e-4)
    assert len({tuple(sorted(row)) for row in routing.experts.tolist()}) > 1  # texts differ in what they want
    every = torch.einsum("nsh,eh->nse", inputs.hidden, gate.linears[0].weight)
    torch.testing.assert_close(routing.logits, every, atol=1e-3, rtol=1e-4)  # losses see all experts


@pytest.mark.parametrize("shortlist", [3, None])
def test_the_tokens_of_a_text_choose_the_same_in_any_batch_order_and_padding(shortlist):
    gate, inputs = shortlisted(shortlist=shortlist, top_k=2), random_input(rows=4)
    together = gate.route(inputs).dense_weights(12)
    order = torch.tensor([2, 0, 3, 1])
    turned = gate.route(GateInput(inputs.hidden[order], inputs.attention_mask[order], 0)).dense_weights(12)
    torch.testing.assert_close(turned, together[order], atol=1e-6, rtol=1e-5)
    for row in range(4):
        length = int(inputs.attention_mask[row].sum())
        alone = GateInput(inputs.hidden[row : row + 1, :length], inputs.attention_mask[row : row + 1, :length], 0)
        torch.testing.assert_close(gate.route(alone).dense_weights(12)[0], together[row, :length], atol=1e-6, rtol=1e-5)


def test_a_shortlist_of_all_experts_is_none():
    inputs = random_input()
    expected = shortlisted(shortlist=None, top_k=2).route(inputs)
    for shortlist in (12, 20):
        assert torch.equal(shortlisted(shortlist=shortlist, top_k=2).route(inputs).weights, expected.weights)


def test_the_gradient_reaches_a_shortlisted_gate():
    gate = shortlisted(shortlist=3, top_k=2)
    (gate.route(random_input()).dense_weights(12) * torch.arange(12.0)).sum().backward()
    assert gate.linears[0].weight.grad.abs().max() > 1e-4


def test_arrow_does_not_care_for_the_sign_of_a_vector_and_an_expert_without_deltas_responds_to_nothing():
    vectors = torch.nn.functional.normalize(torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors[2] = 0
    inputs = random_input()
    first = ArrowGate(["a", "b", "c"], {0: vectors}, selection=Selection(top_k=2)).route(inputs)
    turned = ArrowGate(["a", "b", "c"], {0: -vectors}, selection=Selection(top_k=2)).route(inputs)
    assert torch.equal(first.weights, turned.weights)
    assert not first.weights[..., 2][inputs.attention_mask.bool()].any()


@pytest.mark.parametrize("kind", ["token", "arrow"])
def test_token_gates_decide_in_float32_under_bf16_autocast_and_on_bf16_states(kind):
    names = [f"e{index}" for index in range(EXPERTS)]
    if kind == "token":
        gate = TokenGate(names, HIDDEN, blocks=[0], selection=Selection(top_k=2))
        gate.initialise(torch.Generator().manual_seed(0))
    else:
        vectors = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
        gate = ArrowGate(names, {0: vectors}, selection=Selection(top_k=2))
    inputs = random_input()
    low = replace(inputs, hidden=inputs.hidden.bfloat16())
    exact = gate.route(low)
    assert exact.weights.dtype == exact.logits.dtype == torch.float32
    torch.testing.assert_close(exact.logits, gate.route(replace(low, hidden=low.hidden.float())).logits)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate.route(low).logits, exact.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", [
    SequenceGate(["a", "b"], HIDDEN, block=1, selection=Selection(min_confidence=0.02), num_pairs=3),
    PrototypeGate(["a", "b"], HIDDEN, block=0, selection=Selection()),
    TokenGate(["a", "b", "c"], HIDDEN, blocks=[0, 2], selection=Selection(top_k=2, top_p=0.9), shortlist=2),
], ids=["sequence", "prototype", "token"])  # fmt: skip
def test_a_gate_is_built_again_from_its_entry_in_a_manifest(gate):
    again = build_gate(json.loads(json.dumps(describe_gate(gate))), HIDDEN)
    assert type(again) is type(gate)
    assert (again.names, again.selection) == (gate.names, gate.selection)
    assert describe_gate(again) == describe_gate(gate)
    again.load_state_dict(gate.state_dict())
