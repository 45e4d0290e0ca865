"""Answers for raw texts: where entities stand, what a gate decides, streams and forms."""

from dataclasses import replace

import pytest
import torch
from toy_checkpoints import assert_same, logits_of, passes
from toys import JOINT, ODD_TEXTS, SINGLE, train_joint, varied_texts, write_toy

import sparse_ft
from sparse_ft.backbone.words import split_words
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.experts.gates import TokenGate
from sparse_ft.prediction.loaded_model import CHUNK, Prediction


@pytest.fixture(scope="module")
def model(toys):
    return sparse_ft.load(toys, device="cpu")


@pytest.fixture(scope="module")
def eager_tagger(toys):
    """A model that takes every word for a person of its own."""
    loaded = sparse_ft.load(toys, device="cpu")
    labels = loaded.tasks["names"].label_names
    with torch.no_grad():
        loaded.checkpoint.model.head("names").linear.bias[1 + 2 * labels.index("PER")] = 1e6
    return loaded


# Where entities stand


@pytest.mark.parametrize("text", [*ODD_TEXTS, ("Ada Lovelace in London " * 500)[:10_000]])
def test_offsets_are_those_of_the_text_as_given(model, text):
    (prediction,) = model.predict([text], ["names"])
    assert prediction.text == text
    end = 0
    for entity in prediction.tasks["names"]["entities"]:
        assert entity["text"] == text[entity["start"] : entity["end"]]
        assert entity["text"].strip() == entity["text"] != ""
        assert end <= entity["start"] < entity["end"] <= len(text)
        assert entity["type"] in {"PER", "LOC"}
        assert 0 < entity["score"] <= 1
        end = entity["end"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_word_has_its_own_place(eager_tagger, text):
    found = eager_tagger.predict([text], ["names"])[0].tasks["names"]["entities"]
    words = [tuple(word) for word in split_words(text)]
    places = [(entity["text"], entity["start"], entity["end"]) for entity in found]
    assert set(places) <= set(words)
    assert places == sorted(places, key=lambda place: place[1])
    if text.isascii() and text.isprintable():  # the tokenizer drops no word of these
        assert places == words


def test_the_words_of_a_long_text_are_tagged_as_far_as_it_goes(model):
    text = " ".join(["the weather"] * 900 + ["Ada Lovelace in London"])
    rows = model.logits([text], "names")
    assert rows[0].shape == (1804, 5)
    assert all(row.abs().max() > 0 for row in rows[0])


def test_minilm_finds_what_stands_in_the_text(minilm_toys):
    model = sparse_ft.load(minilm_toys, device="cpu")
    text = "then  Charles Babbage\n😀 the company in Lisbon"
    entities = model.predict([text], ["names"])[0].tasks["names"]["entities"]
    found = [(entity["type"], entity["text"]) for entity in entities]
    assert ("PER", "Charles Babbage") in found
    assert ("LOC", "Lisbon") in found
    assert model.predict(["at table loved"], "mood")[0].tasks["mood"]["label"] == "good"


# Mixed by the gate


@pytest.fixture(params=JOINT)
def mixture(request, joint_toys):
    return sparse_ft.load(joint_toys(request.param), device="cpu")


def test_mixed_answers_are_those_of_the_logits(mixture):
    texts = varied_texts(20)
    answers, logits = mixture.predict(texts, "all"), mixture.logits(texts, "mood")
    labels = mixture.tasks["mood"].label_names
    scores = [max(zip(row.softmax(-1).tolist(), labels, strict=True)) for row in logits]
    assert [answer.tasks["mood"]["label"] for answer in answers] == [label for _, label in scores]
    assert [answer.tasks["mood"]["score"] for answer in answers] == pytest.approx(
        [score for score, _ in scores], abs=1e-5
    )
    expected = logits_of(mixture.checkpoint.model, "mood", texts[:5])
    torch.testing.assert_close(logits[:5], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_one_gated_pass_serves_all_heads_that_read_texts(mixture):
    texts = ["the table loved", "half boring of", "Ada met Mozart"]
    own = 1 if isinstance(mixture.checkpoint.model.gate, TokenGate) else 2  # a gate for texts reads them first
    assert passes(mixture, lambda: mixture.predict(texts, "mood")) == own
    assert passes(mixture, lambda: mixture.predict(texts, ["mood", "about"])) == own
    assert passes(mixture, lambda: mixture.predict(texts, SINGLE)) == own


def test_the_routing_of_a_mixed_answer_sums_to_one_without_the_shared_expert(mixture):
    gate = mixture.checkpoint.model.gate
    for answer in mixture.predict(varied_texts(10), ["mood"]):
        assert answer.routing.keys() <= set(gate.names)
        assert sum(answer.routing.values()) == pytest.approx(1, abs=1e-4)


def test_without_tasks_a_gate_for_tokens_answers_all_and_one_for_texts_those_of_its_choice(mixture):
    texts, gate = varied_texts(10), mixture.checkpoint.model.gate
    found, named = mixture(texts), mixture.predict(texts, SINGLE)
    for one, other in zip(found, named, strict=True):
        best = SINGLE if isinstance(gate, TokenGate) else [max(one.routing, key=one.routing.get)]
        assert list(one.tasks) == best
        assert_same([one], [replace(other, tasks={name: other.tasks[name] for name in best}, routing=one.routing)])


def test_a_pool_behind_a_gate_for_texts_answers_all_tasks_in_one_pass(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(16, 8, 8)) for name in ("mood", "about", "reply")]
    path = train_joint(tasks, tiny_bert, tmp_path / "out", train__epochs=1, experts__pool=3).path
    model = sparse_ft.load(path, device="cpu")
    texts, pairs = ["the table loved", "half boring of"], [("the table", "half loved"), ("of", "boring")]
    assert passes(model, lambda: model(texts)) == 2  # the gate's, and one for both tasks
    for given, names in ((texts, ["mood", "about"]), (pairs, ["reply"])):
        answers = model(given)
        assert [list(answer.tasks) for answer in answers] == [names] * 2
        named = model.predict(given, names)
        assert_same(answers, [replace(other, routing=one.routing) for one, other in zip(answers, named, strict=True)])


# Streams


def test_a_stream_is_read_no_further_than_needed(model):
    read = 0

    def source():
        nonlocal read
        for place in range(10 * CHUNK):
            read += 1
            yield "loved" if place % 3 else "boring"

    stream = model.stream(source(), "mood")
    assert read == 0
    first = next(stream)
    assert first.text == "boring"
    assert read <= CHUNK
    for _ in range(CHUNK):
        next(stream)
    assert CHUNK < read <= 2 * CHUNK


def test_a_stream_keeps_the_order(model):
    texts = [f"{'loved ' * (place % 7)}{place}" for place in range(CHUNK + 40)]
    found = list(model.stream(iter(texts), "mood"))
    assert [prediction.text for prediction in found] == texts
    assert_same(found[CHUNK - 3 : CHUNK + 3], model.predict(texts[CHUNK - 3 : CHUNK + 3], "mood"))
    assert list(model.stream([], "mood")) == []


# Forms


def test_forms_of_answers(model):
    (one,) = model.predict(["the table loved"], ["mood", "about", "names"])
    content = one.to_dict()
    assert list(content) == ["text", "tasks", "routing"]
    assert content["routing"] == {"mood": 1.0, "about": 1.0, "names": 1.0}
    assert set(content["tasks"]["mood"]) == {"label", "score"}
    assert 0.5 <= content["tasks"]["mood"]["score"] <= 1
    (about,) = model.predict(["music half football"], ["about"])
    labels = about.tasks["about"]["labels"]
    assert {entry["label"] for entry in labels} <= {"music", "football"}
    assert [entry["score"] for entry in labels] == sorted((entry["score"] for entry in labels), reverse=True)
    assert model.predict([], "mood") == []


def test_a_call_answers_one_text_or_a_list(model, toys):
    assert isinstance(model("loved"), Prediction)
    assert [type(entry) for entry in model(["loved", "boring"])] == [Prediction, Prediction]
    assert model(["loved"])[0] == model("loved")
    assert sparse_ft.predict(model, ["loved"]) == [model("loved")]
    assert sparse_ft.predict(toys, ["loved"], device="cpu") == [model("loved")]


def seen_by_backbone(model, call) -> dict[str, torch.Tensor]:
    """Return what the first forward pass of a call gives to the backbone."""
    passes = []
    encoder = model.checkpoint.model.encoder
    handle = encoder.register_forward_pre_hook(lambda _, args, kwargs: passes.append(kwargs), with_kwargs=True)
    call()
    handle.remove()
    return passes[0]


def test_pairs_are_read_as_pairs(model):
    one, other = ("the table", "half loved"), ("half loved", "the table")
    first = model.predict([one, other], ["reply"])[0]
    assert (first.text, first.text_pair) == one
    assert list(first.to_dict()) == ["text", "text_pair", "tasks", "routing"]
    assert first.tasks["reply"]["label"] in {"y", "n"}
    assert model.logits([one, other], "reply").shape == (2, 2)
    for pair in (one, other):
        seen = seen_by_backbone(model, lambda pair=pair: model.logits([pair], "reply"))
        expected = model.checkpoint.model.backbone.tokenizer(*pair)
        assert seen["input_ids"].tolist() == [expected["input_ids"]]
        assert seen["token_type_ids"].tolist() == [expected["token_type_ids"]]


def test_shapes_of_logits(model):
    assert model.logits(["a", "", "the table"], "mood").shape == (3, 2)
    assert model.logits(["a", "", "the table"], "about").shape == (3, 2)
    assert model.logits(["a"], "mood").dtype == torch.float32
    rows = model.logits(["Ada in London", "", "the table!"], "names")
    assert [tuple(row.shape) for row in rows] == [(3, 5), (0, 5), (3, 5)]
    assert model.logits([], "mood").shape == (0, 2)
    assert model.logits([], "names") == []
    probabilities = model.logits((text for text in ["the table loved"]), "mood")[0].softmax(-1)
    answer = model.predict(["the table loved"], "mood")[0].tasks["mood"]
    assert answer["score"] == pytest.approx(probabilities.max().item())


@pytest.mark.parametrize(("texts", "tasks", "error", "message"), [
    (["a"], "moood", ConfigError, r"Unknown task in this model 'moood'\. Did you mean 'mood'\? Known: mood, reply"),
    (["a"], ["mood", "x"], ConfigError, "Unknown task in this model 'x'"),
    (["a"], [], ConfigError, 'No task is given'),
    (["a"], "reply", DataError, r"Task 'reply' reads two texts a row, got one: 'a'"),
    ([("a", None)], "reply", DataError, r"Expected a text or a pair of texts, got tuple: \('a', None\)"),
    ([("a", "b"), (3, "b")], "reply", DataError, r"got tuple: \(3, 'b'\).* all of them strings"),
    ([("a", None, [1, 2])], "reply", DataError, r"got tuple: \('a', None, \[1, 2\]\)"),
    ([(None, None, ["b"])], "reply", DataError, "Expected a text or a pair of texts, got tuple"),
    ([("a", "b")], "mood", DataError, r"Task 'mood' reads one text a row, got two: \('a', 'b'\)"),
    ([None], "mood", DataError, "Expected a text or a pair of texts, got NoneType: None"),
    ([b"a"], "mood", DataError, "Expected a text or a pair of texts, got bytes"),
    ([("a", "b", "c")], "reply", DataError, "Expected a text or a pair of texts, got tuple"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused(model, texts, tasks, error, message):
    with pytest.raises(error, match=message):
        model.predict(texts, tasks)
    with pytest.raises(error, match=message):
        list(model.stream(texts, tasks))
