"""What leaves the toolkit gives the same answers in the library that it is for."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from toy_checkpoints import LABELS, TEXTS, add_random_expert, saved, without_shapes
from toys import call, write_rows, write_toy
from typer.testing import CliRunner

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.pooling import pool
from sparse_ft.backbone.words import split_words, word_shape
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.cli.main import app
from sparse_ft.config import RunConfig
from sparse_ft.errors import ConfigError, ExportError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.experts.routing import ForwardPass, Routing
from sparse_ft.integrations.exporters.int8 import int8_scores
from sparse_ft.integrations.exporters.parts import fold, fresh_copy
from sparse_ft.integrations.round_trip import Difference
from sparse_ft.merging.edit import edit
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import load_task, parse_task

HEADS = {"mood": ("text", 2), "names": ("word", 5)}


def files(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def as_given(tokenizer, texts):
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")


def word_logits(logits, encoded, rows, *, last):
    """The logits that stand for each word of each row."""
    found = []
    for place, row in enumerate(rows):
        ids = encoded.word_ids(place)
        marks = [[at for at, word in enumerate(ids) if word == number] for number in range(len(row))]
        found.append(logits[place, [mark[-1 if last else 0] for mark in marks]])
    return found


def words_of(texts):
    return [[word.text for word in split_words(text)] for text in texts]


def assert_close(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.as_tensor(right), left, atol=5e-5, rtol=1e-5)


# Folding, against the expert layer and the formula


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_folded_backbone_gives_the_hidden_states_of_the_expert_layers(make_model, family):
    model = make_model(family, {"a": ("text", 2), "b": ("text", 2)}, rank={"a": 4, "b": 7})
    backbone = fresh_copy(model.backbone)
    module = next(iter(model.experts.get("b").deltas))
    before = backbone.linears[module].weight.clone()
    fold(backbone, model.experts.get("b"))
    ids = torch.tensor([[2, 11, 12, 13, 3]])
    with torch.no_grad(), model.slot.filled(ForwardPass(Routing.one_hot([1]))):
        expected = model.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(backbone.model(input_ids=ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    lora_a, lora_b = model.experts.get("b").deltas[module]
    delta = 8.0 / 7 * lora_b.double() @ lora_a.double()
    delta = delta.t() if family == "gpt2" else delta
    torch.testing.assert_close(backbone.linears[module].weight, (before.double() + delta).float(), atol=0, rtol=0)


# PEFT


@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama", "deberta-v2"])
def test_peft_loads_what_was_exported(tmp_path, monkeypatch, make_model, family):
    from peft import AutoPeftModelForTokenClassification
    from transformers import AutoTokenizer

    path = without_shapes(tmp_path / "first", make_model, family)
    result = sparse_ft.export(path, format="peft", output=tmp_path / "out")
    model = sparse_ft.load(path, device="cpu")
    last = model.checkpoint.model.backbone.family.causal
    found = {}
    for task, (_, outputs) in HEADS.items():
        folder = result.path / task
        theirs = AutoPeftModelForTokenClassification.from_pretrained(folder, num_labels=outputs).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            if task == "mood":
                batch = as_given(tokenizer, TEXTS)
                classifier = theirs.get_base_model()
                tokens = classifier.base_model(**batch).last_hidden_state
                head = classifier.score if family == "llama" else classifier.classifier
                found[task] = head(pool(tokens, batch["attention_mask"], "last" if last else "unit"))
            else:
                batch = tokenizer(words_of(TEXTS), is_split_into_words=True, padding=True, return_tensors="pt")
                found[task] = word_logits(theirs(**batch).logits, batch, words_of(TEXTS), last=last)
        assert_close(model.logits(TEXTS, task), found[task])
        assert {"README.md", "export.json", "adapter_config.json", "adapter_model.safetensors"} <= set(files(folder))
        if task == "mood":
            card = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
            monkeypatch.chdir(result.path)
            shown = {}
            written, meant = r"tokenizer\(.*, truncation=True", f"tokenizer({TEXTS!r}, padding=True, truncation=True"
            exec(re.sub(written, meant, card), shown)
            assert_close(model.logits(TEXTS, task), shown["logits"].detach())
        record = json.loads((folder / "export.json").read_text())["tasks"][task]["difference"]
        assert record == result.differences[task].to_dict()
        assert 0 < record["texts"] <= record["answers"]
        assert record["disagreements"] == 0
        assert record["largest"] < 5e-5 < record["scale"]


# transformers


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Where transformers copies the code of models, for this test alone."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_pipelines_give_the_answers_of_the_checkpoint(tmp_path, own_modules, make_model, family):
    from transformers import pipeline

    path = without_shapes(tmp_path / "first", make_model, family)
    result = sparse_ft.export(path, format="transformers", output=tmp_path / "out")
    model = sparse_ft.load(path, device="cpu")
    classify = pipeline("text-classification", model=str(result.path / "mood"), trust_remote_code=True)
    for text, answer in zip(TEXTS, classify(TEXTS, truncation=True), strict=True):
        (ours,) = model.predict([text], ["mood"])
        assert answer["label"] == ours.tasks["mood"]["label"]
        assert answer["score"] == pytest.approx(ours.tasks["mood"]["score"], abs=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # never a stock class with a random head
        pipeline("text-classification", model=str(result.path / "mood"), trust_remote_code=False)
    tag = pipeline("token-classification", model=str(result.path / "names"))
    assert tags_of_words(tag, model) == best_tags(model)
    assert "Scores of the checkpoint" not in (result.path / "mood" / "README.md").read_text()


def best_tags(model):
    """The best tag of each word by itself, by text."""
    tags = find_kind("token_classification").outputs(["PER", "LOC"])
    return [[tags[best] for best in logits.argmax(-1)] for logits in model.logits(TEXTS, "names")]


def tags_of_words(tag, model):
    """The same from a pipeline that is given words."""
    last, found = model.checkpoint.model.backbone.family.causal, []
    for words in words_of(TEXTS):
        places = {}
        (pieces,) = tag([words], is_split_into_words=True, ignore_labels=[])
        for piece in pieces:
            place = len(" ".join(words)[: piece["end"]].rstrip().split(" ")) - 1
            if last or place not in places:
                places[place] = piece["entity"]
        found.append([places[place] for place in range(len(words))])
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_expert_that_sees_word_shapes_brings_its_tokenizer(tmp_path, own_modules, make_model, family):
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    path = saved(tmp_path / "first", make_model, family, heads=HEADS)
    result = sparse_ft.export(path, format="transformers", task="names", output=tmp_path / "out")
    model, folder = sparse_ft.load(path, device="cpu"), str(result.path)
    plain = sparse_ft.load(without_shapes(tmp_path / "second", make_model, family), device="cpu")
    assert best_tags(model) != best_tags(plain)
    tag = pipeline("token-classification", model=folder, trust_remote_code=True)
    assert tags_of_words(tag, model) == best_tags(model)
    # Texts, one by one and in a padded batch of two.
    one_by_one = [tag(text, ignore_labels=[]) for text in TEXTS]
    for alone, together in zip(one_by_one, tag(TEXTS, ignore_labels=[], batch_size=2), strict=True):
        assert [piece["entity"] for piece in alone] == [piece["entity"] for piece in together]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    loaded = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        batch = tokenizer(words_of(TEXTS), is_split_into_words=True, padding=True, return_tensors="pt")
        found = word_logits(
            loaded(**batch).logits, batch, words_of(TEXTS), last=model.checkpoint.model.backbone.family.causal
        )
        assert_close(model.logits(TEXTS, "names"), found)
        with pytest.raises(ValueError, match="Load the tokenizer of this folder with trust_remote_code=True"):
            loaded(input_ids=batch["input_ids"])
    for load in (AutoTokenizer, AutoModelForTokenClassification):  # never the stock class, which sees no shapes
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load.from_pretrained(folder, trust_remote_code=False)
    assert set(files(result.path)) >= {"modeling_shaped.py", "tokenization_shaped.py", "words.py"}
    assert "trust_remote_code=True)\ntag(" in (result.path / "README.md").read_text()


def test_the_tokenizer_of_an_export_says_how_words_are_written(tmp_path, own_modules, make_model):
    from transformers import AutoTokenizer

    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS)
    result = sparse_ft.export(path, format="transformers", task="names", output=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(result.path, trust_remote_code=True)
    text = TEXTS[2]
    words = [word.text for word in split_words(text)]
    single = tokenizer(text)
    assert single["word_shapes"][0] == single["word_shapes"][-1] == 0  # special tokens
    given = tokenizer(words, is_split_into_words=True)
    assert given["word_shapes"] == single["word_shapes"]
    assert [0 if place is None else word_shape(words[place]) for place in given.word_ids()] == given["word_shapes"]
    assert tokenizer([words, words[:1]], is_split_into_words=True)["word_shapes"][0] == single["word_shapes"]
    assert tokenizer(text, return_tensors="pt")["word_shapes"].tolist() == [single["word_shapes"]]
    assert tokenizer("")["word_shapes"] == [0, 0]
    assert tokenizer([text, ""], padding=True)["word_shapes"][1] == [0] * len(single["word_shapes"])
    short = tokenizer(text, truncation=True, max_length=4)
    assert len(short["word_shapes"]) == 4
    windows = tokenizer(text, truncation=True, max_length=6, stride=2, return_overflowing_tokens=True)
    assert [len(row) for row in windows["word_shapes"]] == [len(row) for row in windows["input_ids"]]
    assert windows["word_shapes"][1][1:3] == single["word_shapes"][3:5]


# ONNX


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_bert):
    """A graph of four tasks and two experts, one of which sees word shapes, with int8: checkpoint, folder, output."""
    folder = tmp_path_factory.mktemp("graph")
    model = SparseExpertModel(load_backbone(str(tiny_bert)))
    add_random_expert(model, "both", first_block=1, targets=["query", "dense"], rank=4)
    add_random_expert(model, "names", first_block=2, targets=["query"], rank=6, seed=2)
    tagger = model.experts.get("names")
    shapes = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    model.experts.replace(Expert("names", tagger.alpha, tagger.deltas, shapes))
    specs = {}
    for task, labels in LABELS.items():
        spec = specs[task] = load_task(write_toy(folder, task, sizes=(2, 2, 6), labels=labels))
        kind, expert = find_kind(spec.kind), "names" if task == "names" else "both"
        head = model.add_task(task, expert=expert, level=kind.level, num_outputs=len(kind.outputs(labels)))
        head.initialise(seed=1, name=task)
    config = RunConfig(sources={task: str(folder / task) for task in LABELS})
    save_checkpoint(folder / "checkpoint", model=model.eval(), tasks=specs, config=config, metrics={})
    arguments = ["export", str(folder / "checkpoint"), "--format", "onnx", "--int8", "--output", str(folder / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return folder / "checkpoint", folder / "out", done.output


def onnx_inputs(tokenizer, words, expert):
    batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="np")
    shapes = [[0 if word is None else word_shape(row[word]) for word in batch.word_ids(place)]
              for place, row in enumerate(words)]  # fmt: skip
    return batch, {**batch, "word_shapes": np.array(shapes), "expert": np.array(expert)}


def test_one_graph_answers_all_tasks_in_one_batch_of_any_size(graph):
    import onnxruntime
    from transformers import AutoTokenizer

    path, folder, _ = graph
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    about = json.loads((folder / "tasks.json").read_text())
    assert {entry.name for entry in session.get_inputs()} == set(about["inputs"])
    assert {task: entry["expert"] for task, entry in about["tasks"].items()} == {
        "mood": 0,
        "reply": 0,
        "about": 0,
        "names": 1,
    }
    assert about["tasks"]["names"]["labels"] == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    model, tokenizer = sparse_ft.load(path, device="cpu"), AutoTokenizer.from_pretrained(folder)
    for texts in (TEXTS, TEXTS[1:2], TEXTS[2:] * 5):  # rows of the tagger and of the others by turns
        words = words_of(texts)
        for own in ([place % 2 for place in range(len(texts))], [(place + 1) % 2 for place in range(len(texts))]):
            batch, feed = onnx_inputs(tokenizer, words, own)
            feed["word_shapes"][[place for place, expert in enumerate(own) if not expert]] = 0
            found = dict(zip(about["tasks"], session.run(list(about["tasks"]), feed), strict=True))
            tagged = word_logits(torch.from_numpy(found["names"]), batch, words, last=False)
            for place, expert in enumerate(own):
                spaced = " ".join(words[place])
                for task in ("names",) if expert else ("mood", "about"):
                    (ours,) = model.logits([spaced], task)
                    theirs = tagged[place] if task == "names" else found[task][place]
                    assert_close([ours], [theirs])


def test_pairs_reach_the_graph_with_their_token_types(graph):
    import onnxruntime
    from transformers import AutoTokenizer

    path, folder, _ = graph
    session, pairs = onnxruntime.InferenceSession(folder / "model.onnx"), [("no", "yes"), ("Ada met Mozart", "x")]
    batch = AutoTokenizer.from_pretrained(folder)(*zip(*pairs, strict=True), padding=True, return_tensors="np")
    assert batch["token_type_ids"].any()
    feed = {**batch, "word_shapes": np.zeros_like(batch["input_ids"]), "expert": np.zeros(2, dtype=np.int64)}
    assert_close(sparse_ft.load(path, device="cpu").logits(pairs, "reply"), session.run(["reply"], feed)[0])


def test_a_rows_logits_do_not_depend_on_the_padding(graph):
    import onnxruntime
    from transformers import AutoTokenizer

    _, folder, _ = graph
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    _, feed = onnx_inputs(AutoTokenizer.from_pretrained(folder), words_of(TEXTS[:1]), [0])
    wide = {name: value if name == "expert" else np.pad(value, ((0, 0), (0, 9))) for name, value in feed.items()}
    for task in ("mood", "about"):
        (alone,), (padded,) = session.run([task], feed), session.run([task], wide)
        np.testing.assert_allclose(alone, padded, atol=1e-5)


@pytest.mark.parametrize(
    ("tasks", "merged"),
    [
        pytest.param(["mood"], False, id="texts"),
        pytest.param(["names"], False, id="words with shapes"),
        pytest.param(["mood", "names"], False, id="two experts"),
        pytest.param(["mood", "names"], True, id="two tasks of one expert"),
        pytest.param(["mood"], True, id="texts, of an expert that sees shapes elsewhere"),
    ],
)
def test_the_card_of_a_graph_runs(tmp_path, monkeypatch, graph, tasks, merged):
    path, _, _ = graph
    chosen = tmp_path / "chosen"
    others = ["reply", "about"]
    if merged:
        heads = [str(path / "experts" / name) for name in ("both", "names")]
        sparse_ft.merge(heads, method="cat", output=chosen)
    else:
        sparse_ft.merge([path], method="stack", output=chosen)
    loaded = load_checkpoint(chosen)
    for task in others:
        loaded.model.remove_task(task)
        del loaded.tasks[task]
    save_checkpoint(chosen, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    alone = {"task": tasks[0]} if len(tasks) == 1 else {}
    result = sparse_ft.export(chosen, format="onnx", output=tmp_path / "out", **alone)
    card = (result.path / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    found = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    (row,) = found["rows"]
    text = " ".join(row) if isinstance(row, list) else row
    (ours,) = sparse_ft.load(chosen, device="cpu").logits([text], tasks[0])
    theirs = torch.as_tensor(found["logits"])
    if tasks[0] == "names":
        (theirs,) = word_logits(theirs, found["batch"], [row], last=False)
    else:
        (theirs,) = theirs
    assert_close([ours], [theirs])
    assert ("word_shapes" in found["feed"]) == (len(tasks) > 1 or tasks == ["names"])
    assert ("expert" in found["feed"]) == (len(tasks) > 1 and not merged)


def test_int8_says_what_it_loses(graph):
    _, folder, said = graph
    for task, entry in json.loads((folder / "export.json").read_text())["tasks"].items():
        scores = entry["int8"]
        assert (scores["split"], scores["rows"]) == ("test", 6)
        assert scores["loss"] == scores["float32"] - scores["int8"]
        assert 0 <= scores["int8"] <= 1
        assert f"{task}, test, 6 rows: {scores['metric']} {scores['float32']:.4f} with float32, " in said
        assert entry["difference"]["disagreements"] == 0
    assert (folder / "model.int8.onnx").stat().st_size < (folder / "model.onnx").stat().st_size


def test_int8_scores_tagging_that_is_annotated_by_characters(graph, tmp_path):
    checkpoint, folder, _ = graph
    model = sparse_ft.load(checkpoint, device="cpu")
    rows = [
        {"text": "Ada met London-based Mozart!", "spans": [{"start": 8, "end": 14, "type": "LOC"}]},
        {"text": "Thanks!", "spans": []},
    ]
    write_rows(tmp_path / "test.jsonl", rows)
    columns = {"text": "text", "spans": "spans"}
    model.tasks["names"] = model.tasks["names"].model_copy(update={"columns": columns})
    scores = int8_scores(model, ["names"], folder=folder, sources={"names": str(tmp_path)})["names"]
    assert (scores["split"], scores["rows"]) == ("test", 2)
    assert (
        scores["float32"]
        == sparse_ft.evaluate(model, data=str(tmp_path), tasks="names").tasks["names"].score.metrics["f1"]
    )


@pytest.mark.parametrize("language", ['en")\nprint("run', "en'", "", "e"])
def test_the_language_of_a_task_never_becomes_code(language):
    with pytest.raises(ConfigError, match=r"language"):
        parse_task({"name": "x", "kind": "token_classification", "language": language}, where="x.yaml")


# The real backbone


@pytest.mark.parametrize(("format", "kind", "shapes"), [
    ("peft", "token_classification", False),
    ("transformers", "classification", False),
    ("transformers", "token_classification", True),
    ("onnx", "token_classification", True),
])  # fmt: skip
def test_minilm_leaves_intact(tmp_path, minilm, format, kind, shapes):
    model, labels = SparseExpertModel(load_backbone(minilm)), ["a", "b", "c"]
    add_random_expert(model, "own", first_block=3, rank=8, alpha=1.0)
    if shapes:
        expert = model.experts.get("own")
        table = torch.randn(9, 384, generator=torch.Generator().manual_seed(3))
        model.experts.replace(Expert("own", expert.alpha, expert.deltas, table))
    values = {"name": "own", "kind": kind, "labels": labels, "metric": "accuracy", "columns": {"text": "text"}}
    level, outputs = find_kind(kind).level, find_kind(kind).outputs(labels)
    model.add_task("own", expert="own", level=level, num_outputs=len(outputs)).initialise(seed=1, name="own")
    specs = {"own": parse_task(values, where="own")}
    save_checkpoint(tmp_path / "first", model=model.eval(), tasks=specs, config=RunConfig(), metrics={})
    result = sparse_ft.export(tmp_path / "first", format=format, output=tmp_path / "out")
    (found,) = result.differences.values()
    assert found.disagreements == 0
    assert found.texts > 30  # rows of the bundled samples beside the odd ones
    assert found.largest < 2e-5
    if format == "onnx":  # one expert is folded, its word shapes are an input
        about = json.loads((result.path / "tasks.json").read_text())
        assert list(about["inputs"]) == ["input_ids", "attention_mask", "token_type_ids", "word_shapes"]


# What is refused, and that it leaves nothing


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    def check(path, *arguments, output="out", format="peft"):
        before = files(tmp_path)
        where = tmp_path / output
        code, out, err = call(monkeypatch, capsys, "export", path, "--format", format, "--output", where, *arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert files(tmp_path) == before
        assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]
        return err.splitlines()[-1]

    return check


def test_unknown_names_and_taken_folders_are_refused(tmp_path, make_model, refused):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS)
    assert "Unknown format 'pefd'. Did you mean 'peft'? Known: peft, transformers, onnx." in refused(
        path, format="pefd"
    )
    assert "Unknown task in this model 'moood'. Did you mean 'mood'?" in refused(path, "--task", "moood")
    assert "holds a checkpoint already. Choose another --output" in refused(path, output="first/checkpoint")
    assert "is not empty" in refused(path, output="first")
    assert "--int8, and --data for it, are of the format onnx, not peft" in refused(path, "--int8")
    assert "--data is for --int8" in refused(path, "--data", "mood=here", format="onnx")


@pytest.mark.parametrize("name", ["linear", "expert"])
def test_a_task_may_be_called_as_a_value_of_the_graph_is(tmp_path, make_model, name):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS)
    named = edit(path, copy=[("mood", name)], output=tmp_path / "named").path
    if name == "expert":  # an input
        with pytest.raises(ExportError, match="Task 'expert' is called as an input of the graph is"):
            sparse_ft.export(named, format="onnx", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    result = sparse_ft.export(named, format="onnx", task=name, output=tmp_path / "out")
    assert set(result.differences) == {name}


def test_word_shapes_are_refused_where_there_is_no_place_for_them(tmp_path, make_model, refused):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS)
    said = refused(path, format="peft")
    assert "The expert 'names' of task 'names' sees how a word is written (experts.word_shapes)" in said
    assert "Export it as transformers or onnx" in said
    assert "--task exports one of the others: mood." in said
    assert "--set experts.word_shapes=false" in said


@pytest.mark.parametrize("format", ["peft", "transformers", "onnx"])
def test_what_the_gate_mixes_is_refused(tmp_path, make_model, refused, format):
    from dataclasses import replace

    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS, gate=True)
    loaded = load_checkpoint(path)
    loaded.model.tasks["mood"] = replace(loaded.model.tasks["mood"], joint=True)
    save_checkpoint(path, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    said = refused(path, "--task", "mood", format=format)
    assert "what depends on the text cannot be folded into weights. Serve the checkpoint with sparse_ft.load" in said
    assert "sparse-ft train --task mood" in said


def test_a_task_with_one_expert_leaves_a_gated_checkpoint(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS, gate=True)
    result = sparse_ft.export(path, format="peft", task="mood", output=tmp_path / "out")
    card = (result.path / "README.md").read_text()
    assert "The gate of the checkpoint, which chooses an expert for a text, is not in here." in card
    assert "adapter_config.json" in files(result.path)


def test_modernbert_is_refused_but_for_onnx(tmp_path, make_model, refused):
    path = saved(tmp_path / "first", make_model, "modernbert", heads={"mood": ("text", 2)})
    said = refused(path, format="transformers")
    assert "ModernBertForTokenClassification has another layer between the blocks and the head" in said
    assert "Export it as onnx" in said


def test_a_missing_package_is_named(tmp_path, monkeypatch, make_model, refused):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    said = refused(path, format="onnx")
    assert "needs onnxruntime, which is not installed" in said
    assert 'pip install "sparse-ft[onnx]"' in said


def test_an_export_that_answers_otherwise_leaves_nothing(tmp_path, monkeypatch, make_model, refused):
    path = saved(tmp_path / "first", make_model, "bert", heads={"mood": ("text", 2)})
    monkeypatch.setattr(
        "sparse_ft.integrations.exporters.transformers_folder.fold", lambda backbone, expert: None
    )  # it is forgotten
    said = refused(path, format="transformers")
    assert "The export of task 'mood' gives logits that differ by" in said
    assert "Nothing was written" in said


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, make_model):
    def stop(*_, **__):
        raise KeyboardInterrupt

    path = saved(tmp_path / "first", make_model, "bert", heads={"mood": ("text", 2)})
    before = files(tmp_path)
    monkeypatch.setattr("sparse_ft.integrations.export.model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        sparse_ft.export(path, format="peft", output=tmp_path / "out")
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_tasks_has_nothing_to_export(tmp_path, make_model):
    loaded = load_checkpoint(saved(tmp_path / "first", make_model, "bert", heads={"mood": ("text", 2)}))
    loaded.model.remove_task("mood")
    save_checkpoint(tmp_path / "bare", model=loaded.model, tasks={}, config=loaded.config, metrics={})
    with pytest.raises(ConfigError, match="has no task, so there are no answers to export"):
        sparse_ft.export(tmp_path / "bare", format="peft", output=tmp_path / "out")


def test_the_tolerance_grows_with_the_logits_and_nan_never_passes():
    Difference(texts=1, answers=1, largest=9e-4, scale=10.0, disagreements=0).check("x")
    for largest, scale in ((9e-4, 1.0), (2e-4, 0.1), (float("inf"), 1.0), (float("nan"), 1.0)):
        with pytest.raises(ExportError, match="gives logits that differ"):
            Difference(texts=1, answers=1, largest=largest, scale=scale, disagreements=0).check("x")
