"""Answers for raw texts: where entities stand, and that a text's company changes nothing."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import assert_same, logits_of, passes
from toys import JOINT, ODD_TEXTS, SINGLE, run, train_joint, varied_texts, write_toy

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


@pytest.mark.parametrize("text", [*ODD_TEXTS, ("Ada Lovelace in London " * 500)[:10_000]])
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
    alone = [model.predict([text], "mood")[0] for text in ODD_TEXTS]
    assert_same(model.predict(ODD_TEXTS, "mood"), alone)


# The company of a text


def test_a_text_gets_the_same_answer_in_any_company(model):
    texts = [*varied_texts(38), "the table loved", "the table boring"]
    alone = [model.predict([text], SINGLE)[0] for text in texts]
    assert_same(model.predict(texts, SINGLE), alone)
    assert_same(model.predict(texts[::-1], SINGLE)[::-1], alone)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = model.predict([texts[place] for place in order], SINGLE)
    assert_same([shuffled[order.index(place)] for place in range(len(texts))], alone)
    assert {answer.tasks["mood"]["label"] for answer in alone} == {"good", "bad"}
    assert any(answer.tasks["names"]["entities"] for answer in alone)


def test_a_text_gets_the_same_answer_with_several_torch_threads(model):
    texts = varied_texts(20)
    one = model.predict(texts, SINGLE)
    torch.set_num_threads(3)
    try:
        assert_same(model.predict(texts, SINGLE), one)
    finally:
        torch.set_num_threads(1)


def test_one_object_answers_several_threads(model, monkeypatch):
    """A task that cuts long texts beside one that reads them in windows: a tokenizer keeps such settings in itself."""
    texts = varied_texts(20)
    jobs = ["mood", "names"] * 6
    expected = {job: model.predict(texts, job) for job in SINGLE}
    configure = model.encoder.tokenizer.set_truncation_and_padding

    def configure_and_give_way(*args, **kwargs):
        configure(*args, **kwargs)
        time.sleep(0.005)

    monkeypatch.setattr(model.encoder.tokenizer, "set_truncation_and_padding", configure_and_give_way)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: model.predict(texts, job), jobs))
    for job, answers in zip(jobs, found, strict=True):
        assert_same(answers, expected[job])


def test_asking_for_one_task_answers_as_asking_for_all(model):
    texts = varied_texts(10)
    together = model.predict(texts, SINGLE)
    for name in SINGLE:
        apart = model.predict(texts, name)
        assert [list(answer.tasks) for answer in apart] == [[name]] * len(texts)
        assert [answer.tasks[name] for answer in apart] == [answer.tasks[name] for answer in together]
        assert apart[0].routing == {name: 1.0}


# Mixed by the gate


@pytest.fixture(params=JOINT)
def mixture(request, joint_toys):
    return sparse_ft.load(joint_toys(request.param), device="cpu")


def test_mixed_tasks_are_answered_together_as_one_at_a_time(mixture):
    texts = varied_texts(20)
    together = mixture.predict(texts, "all")
    assert list(together[0].tasks) == SINGLE
    for name in SINGLE:
        apart = mixture.predict(texts, name)
        for one, other in zip(apart, together, strict=True):
            assert_same([one], [replace(other, tasks={name: other.tasks[name]}, routing=one.routing)])


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
    assert passes(mixture, lambda: mixture.predict(texts, SINGLE)) == 2 * own  # words are seen as they are written


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
    model = sparse_ft.load(
        train_joint(tasks, tiny_bert, tmp_path / "out", train__epochs=1, experts__pool=3).path, device="cpu"
    )
    texts, pairs = ["the table loved", "half boring of"], [("the table", "half loved"), ("of", "boring")]
    assert passes(model, lambda: model(texts)) == 3  # the gate's for choosing, then its and the whole one for mixing
    for given, names in ((texts, ["mood", "about"]), (pairs, ["reply"])):
        found = model(given)
        assert [list(answer.tasks) for answer in found] == [names] * 2
        named = model.predict(given, names)
        assert_same(found, [replace(other, routing=one.routing) for one, other in zip(found, named, strict=True)])


def test_pairs_and_texts_mix_the_same_experts_whether_their_task_is_named_or_not(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(16, 8, 8)) for name in ("mood", "reply")]
    model = sparse_ft.load(train_joint(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path, device="cpu")
    for given, name in (("the table loved", "mood"), (("the table", "half loved"), "reply")):
        found, named = model([given]), model.predict([given], name)
        assert list(found[0].tasks) == [name]
        assert_same(found, [replace(named[0], routing=found[0].routing)])


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


def test_a_call_answers_one_text_or_a_list(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    model = sparse_ft.load(run([task], tiny_bert, tmp_path / "out", train__epochs=1).path, device="cpu")
    assert isinstance(model("loved"), Prediction)
    assert [type(entry) for entry in model(["loved", "boring"])] == [Prediction, Prediction]
    assert model(["loved"])[0] == model("loved")
    assert sparse_ft.predict(model, ["loved"]) == [model("loved")]
    assert sparse_ft.predict(tmp_path / "out", ["loved"], device="cpu") == [model("loved")]


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


# The package


def test_importing_the_package_loads_no_torch():
    script = """
import sys, sparse_ft
public = {"train", "load", "evaluate", "predict", "SparseFTError", "TrainResult", "LoadedModel", "Prediction",
          "Evaluation", "__version__"}
assert public <= set(sparse_ft.__all__) == set(dir(sparse_ft)), dir(sparse_ft)
import sparse_ft.cli
heavy = {"torch", "transformers", "datasets", "peft", "sklearn", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there():
    for name in sparse_ft.__all__:
        assert getattr(sparse_ft, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = sparse_ft.trian
