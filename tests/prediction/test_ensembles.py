"""Several experts that answer together: the arithmetic on cases made by hand, and whole models against dense ones."""

import json
from types import SimpleNamespace

import pytest
import torch
from toy_checkpoints import assert_same
from toys import call, run, toy_rows, write_toy

import sparse_ft
from sparse_ft.errors import ConfigError
from sparse_ft.merging.edit import edit
from sparse_ft.prediction.ensembles import average, find_ensembles, vote
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.schemes import spans_from_tags

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = ["the table loved", "half boring of", "loved boring", "", "company weather and then at six"]


def logs(rows) -> torch.Tensor:
    return torch.tensor(rows).log()


def label_of(logits, labels="abc") -> tuple[str, float]:
    answer = find_kind("classification").answer(logits, text="", labels=list(labels), language="en")
    return answer["label"], pytest.approx(answer["score"], abs=1e-6)


# Averages


@pytest.mark.parametrize(("kind", "squash"), [
    ("classification", lambda rows: rows.softmax(-1)),
    ("multi_label", torch.sigmoid),
    ("token_classification", lambda rows: rows.softmax(-1)),
])  # fmt: skip
def test_an_average_is_one_of_probabilities(kind, squash):
    rows = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
    expected = squash(rows.double()).mean(0)
    torch.testing.assert_close(squash(average(rows, kind=kind).double()), expected, atol=1e-6, rtol=1e-5)


def test_an_average_of_certainties_stays_finite():
    rows = torch.tensor([[200.0, -200.0], [200.0, -200.0]])
    for kind in ("classification", "multi_label"):
        assert average(rows, kind=kind).isfinite().all()
        assert vote(rows, kind=kind, outputs=["a", "b"]).isfinite().all()


# Votes


@pytest.mark.parametrize(("rows", "label", "score"), [
    ([[0.4, 0.35, 0.25], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]], "a", 0.45),  # two of three, though the third is sure
    ([[0.6, 0.4, 0.0], [0.1, 0.9, 0.0]], "b", 0.9),  # a tie: the surer
    ([[0.6, 0.4, 0.0], [0.1, 0.8, 0.1], [0.7, 0.3, 0.0], [0.1, 0.6, 0.3]], "b", 0.7),  # 0.65 against 0.7
    ([[0.2, 0.3, 0.5], [0.1, 0.7, 0.2], [0.8, 0.1, 0.1]], "a", 0.8),  # all differ
    ([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], "a", 0.5),  # equal in all: the first label
])  # fmt: skip
def test_labels_are_elected(rows, label, score):
    assert label_of(vote(logs(rows), kind="classification", outputs=list("abc"))) == (label, score)


@pytest.mark.parametrize(("column", "expected"), [
    ([0.6, 0.7, 0.1], 0.65),
    ([0.4, 0.3, 0.9], 0.35),
    ([0.9, 0.4], 0.9),  # a tie: 0.4 above a half against 0.1 below
    ([0.6, 0.1], 0.1),
    ([0.5, 0.5], 0.5),
])  # fmt: skip
def test_each_label_of_several_is_voted_for_itself(column, expected):
    rows = torch.tensor([[share, 0.2] for share in column]).logit()
    found = vote(rows, kind="multi_label", outputs=["a", "b"]).sigmoid()
    assert found.tolist() == pytest.approx([expected, 0.2], abs=1e-6)


def tagged(*tags, share=0.8) -> list[list[float]]:
    """Probabilities of one expert that says these tags; a type has ``share`` and a quarter of the rest."""
    rest = (1 - share) / (len(TAGS) - 1)
    return [[share if name == tag else rest for name in TAGS] for tag in tags]


def elected(*experts) -> list[tuple[str, int, int, float]]:
    logits = vote(logs(experts), kind="token_classification", outputs=TAGS)
    words = " ".join("abcdefgh"[: logits.shape[0]])
    answer = find_kind("token_classification").answer(logits, text=words, labels=["PER", "LOC"], language="en")
    return [(e["type"], e["start"] // 2, (e["end"] + 1) // 2, round(e["score"], 4)) for e in answer["entities"]]


def test_spans_are_voted_as_wholes():
    one = tagged("B-PER", "I-PER", "O", "B-LOC")
    other = tagged("B-PER", "I-PER", "O", "O")
    third = tagged("B-PER", "O", "O", "B-LOC", share=0.9)
    assert elected(one, other, third) == [("PER", 0, 2, 0.85), ("LOC", 3, 4, round((0.85 + 0.925) / 2, 4))]
    assert elected(one, one, third) == [("PER", 0, 2, 0.85), ("LOC", 3, 4, round((0.85 + 0.85 + 0.925) / 3, 4))]


def test_half_of_the_votes_need_more_confidence_than_the_other_half():
    yes, sure_yes = tagged("B-PER", "I-PER", share=0.7), tagged("B-PER", "I-PER", share=0.95)
    no, other = tagged("O", "O", share=0.8), tagged("B-LOC", "I-LOC", share=0.8)
    assert elected(yes, no) == []
    assert elected(sure_yes, no) == [("PER", 0, 2, 0.9625)]
    assert elected(sure_yes, other) == [("PER", 0, 2, 0.9625)]
    assert elected(yes, other) == [("LOC", 0, 2, 0.85)]
    assert elected(no, no) == []


def test_tied_spans_never_overlap():
    left, right = tagged("B-PER", "I-PER", "O", share=0.9), tagged("O", "B-LOC", "I-LOC", share=0.9)
    left[2], right[0] = tagged("O", share=0.5)[0], tagged("O", share=0.5)[0]  # each is unsure where the other is sure
    assert len(elected(left, right)) == 1


def test_neighbours_of_one_type_stay_apart():
    assert [place[:3] for place in elected(tagged("B-PER", "B-PER"), tagged("B-PER", "B-PER"))] == [
        ("PER", 0, 1),
        ("PER", 1, 2),
    ]
    assert vote(torch.zeros(2, 0, 5), kind="token_classification", outputs=TAGS).shape == (0, 5)


def test_a_lone_opinion_is_what_everybody_says():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        one = torch.randn(6, 5, generator=generator) * 3
        kind = find_kind("token_classification")
        (tags,) = kind.predictions([one], columns={}, labels=["PER", "LOC"])
        (same,) = kind.predictions(
            [vote(torch.stack([one] * 3), kind="token_classification", outputs=TAGS)], columns={}, labels=["PER", "LOC"]
        )
        assert spans_from_tags(same) == spans_from_tags(tags)


# Whole models


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_bert):
    """Two experts of moods and two of names, each with a head of its own, the labels of the second in another order."""
    folder = tmp_path_factory.mktemp("pair")
    tasks = [
        write_toy(folder, "mood", sizes=(48, 8, 24)),
        write_toy(folder, "mood", as_name="mood2", sizes=(32, 8, 24), labels=["good", "bad"]),
        write_toy(folder, "names", sizes=(48, 8, 24)),
        write_toy(folder, "names", as_name="names2", sizes=(32, 8, 24), labels=["PER", "LOC"]),
        write_toy(folder, "about", sizes=(16, 8, 8)),
    ]
    return run(
        tasks, tiny_bert, folder / "checkpoint", train__epochs=2, train__batch_size=8, train__learning_rate=0.005
    ).path


@pytest.fixture(scope="module")
def model(pair):
    return sparse_ft.load(pair, device="cpu")


@pytest.fixture(scope="module")
def twice(pair, tmp_path_factory):
    """Two of those experts, each beside a copy of itself."""
    output = tmp_path_factory.mktemp("twice") / "out"
    edit(pair, output=output, copy=[("mood", "again"), ("names", "more")], remove=["mood2", "names2"])
    return sparse_ft.load(output, device="cpu")


@pytest.fixture(scope="module")
def halved(pair, tmp_path_factory):
    """The checkpoint with the expert of moods in two halves."""
    output = tmp_path_factory.mktemp("halved") / "out"
    edit(pair, output=output, split=[("mood", "mood-2")])
    return sparse_ft.load(output, device="cpu")


def probabilities(model, task, labels):
    order = [model.tasks[task].label_names.index(label) for label in labels]
    return model.probabilities(TEXTS, task)[:, order]


def test_the_average_of_two_experts(model):
    labels = model.tasks["mood"].label_names
    expected = (probabilities(model, "mood", labels) + probabilities(model, "mood2", labels)) / 2
    assert model.tasks["mood2"].label_names != labels
    for place, answer in enumerate(model.predict(TEXTS, ["mood", "mood2"], combine="average")):
        assert list(answer.tasks) == ["mood"]
        assert answer.routing == {"mood": 0.5, "mood2": 0.5}
        best = expected[place].argmax()
        assert answer.tasks["mood"]["label"] == labels[best]
        assert answer.tasks["mood"]["score"] == pytest.approx(expected[place][best].item(), abs=1e-5)


def test_the_vote_of_two_experts_is_that_of_the_surer(model):
    both = model.predict(TEXTS, ["mood", "mood2"])
    for answer, apart in zip(model.predict(TEXTS, ["mood", "mood2"], combine="vote"), both, strict=True):
        one, other = apart.tasks["mood"], apart.tasks["mood2"]
        agreed = one["label"] == other["label"]
        score = (one["score"] + other["score"]) / 2 if agreed else max(one["score"], other["score"])
        label = one["label"] if one["score"] >= other["score"] else other["label"]
        assert answer.tasks["mood"]["label"] == label
        assert answer.tasks["mood"]["score"] == pytest.approx(score, abs=1e-5)


def test_mixed_experts_are_one_whose_deltas_and_head_are_the_means(model, pair):
    """Built as a dense model: the mean of the deltas added to the frozen weights, and the mean of the heads."""
    dense = sparse_ft.load(pair, device="cpu")
    inner = dense.checkpoint.model
    places = [inner.experts.index(name) for name in ("mood", "mood2")]
    with torch.no_grad():
        for layer in inner.experts.layers.values():
            delta = 0
            for place in places:
                lora_a, lora_b = layer.get(place)
                delta = delta + layer.scales[place] * lora_b @ lora_a / 2
            for place in range(len(inner.experts.names)):
                layer.get(place)[1].zero_()
            layer.frozen.weight += delta
        head, other = inner.head("mood").linear, inner.head("mood2").linear
        order = [dense.tasks["mood2"].label_names.index(label) for label in dense.tasks["mood"].label_names]
        head.weight.copy_((head.weight + other.weight[order]) / 2)
        head.bias.copy_((head.bias + other.bias[order]) / 2)
    expected = dense.predict(TEXTS, "mood")
    found = model.predict(TEXTS, ["mood", "mood2"], combine="mix")
    for one, same in zip(found, expected, strict=True):
        assert one.tasks["mood"]["label"] == same.tasks["mood"]["label"]
        assert one.tasks["mood"]["score"] == pytest.approx(same.tasks["mood"]["score"], abs=1e-5)


@pytest.mark.parametrize("combine", ["mix", "average", "vote"])
def test_an_expert_and_its_copy_say_what_it_says_alone(twice, combine):
    texts = [*TEXTS, "Ada Lovelace in London", "then Mozart"]
    found = twice.predict(texts, ["mood", "again", "names", "more"], combine=combine)
    for one, alone in zip(found, twice.predict(texts, ["mood", "names"]), strict=True):
        assert set(one.tasks) == {"mood", "names"}
        assert one.tasks["mood"]["label"] == alone.tasks["mood"]["label"]
        assert one.tasks["mood"]["score"] == pytest.approx(alone.tasks["mood"]["score"], abs=1e-5)
        for entity, same in zip(one.tasks["names"]["entities"], alone.tasks["names"]["entities"], strict=True):
            assert (entity["type"], entity["text"]) == (same["type"], same["text"])
            least = 0.202 if combine == "vote" else 0.0  # a little over one fifth, of five tags
            assert entity["score"] == pytest.approx(max(same["score"], least), abs=1e-5)


@pytest.mark.parametrize("combine", ["mix", "average", "vote"])
def test_the_experts_of_one_task_are_combined_in_place_of_the_gate(halved, combine):
    assert halved.checkpoint.model.tasks["mood"].experts == ("mood", "mood-2")
    for answer in halved.predict(TEXTS, "mood", combine=combine):
        assert answer.routing == {"mood": 0.5, "mood-2": 0.5}
        assert list(answer.tasks) == ["mood"]


@pytest.mark.parametrize("combine", ["mix", "average", "vote"])
def test_scores_are_those_of_the_answers(model, combine):
    rows = toy_rows("mood", 24, seed=2)
    answers = model.predict([row["text"] for row in rows], ["mood", "mood2"], combine=combine)
    right = sum(answer.tasks["mood"]["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
    scored = sparse_ft.evaluate(model, tasks=["mood", "mood2", "about"], combine=combine)
    assert list(scored.tasks) == ["mood", "about"]
    assert scored.tasks["mood"].score.metrics["accuracy"] == pytest.approx(right / 24)
    assert f"mood · test · {combine} of mood, mood2" in scored.to_text()
    alone = sparse_ft.evaluate(model, tasks=["about"])
    assert scored.tasks["about"].score == alone.tasks["about"].score
    assert scored.routing.to_dict()["usage"]["mood"] == pytest.approx({"mood": 0.5, "mood2": 0.5})


@pytest.mark.parametrize("combine", ["mix", "average", "vote"])
def test_an_answer_does_not_depend_on_its_company(model, combine):
    texts = [*TEXTS, "Ada Lovelace in London " * 30]
    tasks = ["mood", "mood2", "names", "names2"]
    together = model.predict(texts, tasks, combine=combine)
    assert_same(together, [model.predict([text], tasks, combine=combine)[0] for text in texts])
    assert_same(list(model.stream(texts, tasks, combine=combine)), together)


@pytest.mark.parametrize(("tasks", "combine", "message"), [
    (["mood", "mood2"], "averag", r"Unknown way to combine 'averag'\. Did you mean 'average'\?"),
    (["mood"], "vote", "Nothing to combine: mood has one expert each and no"),
    (["mood", "mood"], "vote", "Nothing to combine: mood"),
    (["mood", "names"], "mix", "Nothing to combine: mood, names have"),
    (["mood", "mod2"], "mix", r"Unknown task in this model 'mod2'\. Did you mean 'mood2'\?"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused(model, tasks, combine, message):
    with pytest.raises(ConfigError, match=message):
        model.predict(TEXTS, tasks, combine=combine)
    with pytest.raises(ConfigError, match=message):
        sparse_ft.evaluate(model, tasks=tasks, combine=combine)
    with pytest.raises(ConfigError, match="both say which experts answer"):
        sparse_ft.evaluate(model, tasks=["mood", "mood2"], combine="mix", route="mood")


def test_the_command_line_combines(pair, model, monkeypatch, capsys, tmp_path):
    chosen = ["--task", "mood", "--task", "mood2", "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, "predict", pair, "loved it", *chosen, "--combine", "vote", "--json")
    assert code == 0, err
    expected = model.predict(["loved it"], ["mood", "mood2"], combine="vote")[0]
    assert json.loads(out) == expected.to_dict()
    written = tmp_path / "scores.json"
    code, out, err = call(monkeypatch, capsys, "evaluate", pair, *chosen, "--combine", "average", "--json", written)
    assert code == 0, err
    assert list(json.loads(written.read_text())["tasks"]) == ["mood"]
    for command in (["predict", pair, "loved it"], ["evaluate", pair, "--json", tmp_path / "none.json"]):
        code, out, err = call(monkeypatch, capsys, *command, *chosen, "--combine", "averag")
        assert (code, out) == (2, "")
        assert "Unknown way to combine 'averag'. Did you mean 'average'? Known: mix, average, vote." in err
    assert not (tmp_path / "none.json").exists()


def test_a_task_that_the_gate_mixes_is_refused(model):
    mixed = SimpleNamespace(tasks={"mood": SimpleNamespace(joint=True, shared=None)})
    with pytest.raises(ConfigError, match="'mood' was trained jointly"):
        find_ensembles(mixed, model.tasks, ["mood"], combine="mix")
