"""What leaves the toolkit gives the same answers in the library that it is for."""

import json
import re
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import TEXTS, add_random_expert, assert_close, saved, without_shapes, word_logits, words_of
from toys import call

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.pooling import pool
from sparse_ft.backbone.words import split_words, word_shape
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.config import RunConfig
from sparse_ft.errors import ConfigError, ExportError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.experts.routing import ForwardPass, Routing
from sparse_ft.integrations.exporters.parts import fold, fresh_copy
from sparse_ft.integrations.round_trip import Difference
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import parse_task

HEADS = {"mood": ("text", 2), "names": ("word", 5)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory, make_model):
    """A checkpoint of a classifier and a tagger that sees word shapes; read-only."""
    return saved(tmp_path_factory.mktemp("bert"), make_model, "bert", heads=HEADS)


def files(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def as_given(tokenizer, texts):
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")


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


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
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
                found[task] = classifier.classifier(pool(tokens, batch["attention_mask"], "last" if last else "unit"))
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


@pytest.mark.parametrize("family", ["bert", "gpt2"])
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
        tags = {}
        (pieces,) = tag([words], is_split_into_words=True, ignore_labels=[])
        for piece in pieces:
            index = len(" ".join(words)[: piece["end"]].rstrip().split(" ")) - 1
            if last or index not in tags:
                tags[index] = piece["entity"]
        found.append([tags[index] for index in range(len(words))])
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2"])
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


def test_the_tokenizer_of_an_export_says_how_words_are_written(tmp_path, own_modules, bert):
    from transformers import AutoTokenizer

    result = sparse_ft.export(bert, format="transformers", task="names", output=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(result.path, trust_remote_code=True)
    text = TEXTS[2]
    words = [word.text for word in split_words(text)]
    single = tokenizer(text)
    assert single["word_shapes"][0] == single["word_shapes"][-1] == 0  # special tokens
    given = tokenizer(words, is_split_into_words=True)
    assert given["word_shapes"] == single["word_shapes"]
    assert [0 if index is None else word_shape(words[index]) for index in given.word_ids()] == given["word_shapes"]
    assert tokenizer([words, words[:1]], is_split_into_words=True)["word_shapes"][0] == single["word_shapes"]
    assert tokenizer(text, return_tensors="pt")["word_shapes"].tolist() == [single["word_shapes"]]
    assert tokenizer("")["word_shapes"] == [0, 0]
    assert tokenizer([text, ""], padding=True)["word_shapes"][1] == [0] * len(single["word_shapes"])
    short = tokenizer(text, truncation=True, max_length=4)
    assert len(short["word_shapes"]) == 4
    windows = tokenizer(text, truncation=True, max_length=6, stride=2, return_overflowing_tokens=True)
    assert [len(row) for row in windows["word_shapes"]] == [len(row) for row in windows["input_ids"]]
    assert windows["word_shapes"][1][1:3] == single["word_shapes"][3:5]


@pytest.mark.parametrize("language", ['en")\nprint("run', "e"])
def test_the_language_of_a_task_never_becomes_code(language):
    with pytest.raises(ConfigError, match=r"language"):
        parse_task({"name": "x", "kind": "token_classification", "language": language}, where="x.yaml")


# The real backbone


def test_minilm_leaves_intact(tmp_path, minilm):
    model = SparseExpertModel(load_backbone(minilm))
    add_random_expert(model, "own", first_block=3, rank=8, alpha=1.0)
    expert, shapes = model.experts.get("own"), torch.randn(9, 384, generator=torch.Generator().manual_seed(3))
    model.experts.replace(Expert("own", expert.alpha, expert.deltas, shapes))
    values = {"name": "own", "kind": "token_classification", "labels": ["a", "b", "c"], "metric": "accuracy"}
    specs = {"own": parse_task({**values, "columns": {"text": "text"}}, where="own")}
    model.add_task("own", expert="own", level="word", num_outputs=7).initialise(seed=1, name="own")
    save_checkpoint(tmp_path / "first", model=model.eval(), tasks=specs, config=RunConfig(), metrics={})
    (found,) = sparse_ft.export(tmp_path / "first", format="transformers", output=tmp_path / "out").differences.values()
    assert found.disagreements == 0
    assert found.texts > 30  # rows of the bundled samples beside the odd ones
    assert found.largest < 2e-5


# What is refused, and that it leaves nothing


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    def check(path, *arguments):
        before = files(tmp_path)
        output = [] if "--output" in arguments else ["--output", tmp_path / "out"]
        code, out, err = call(monkeypatch, capsys, "export", path, *arguments, *output)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert files(tmp_path) == before
        assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]
        return err.splitlines()[-1]

    return check


@pytest.mark.parametrize(("arguments", "said"), [
    ("--format pefd", ["'pefd'. Did you mean 'peft'? Known: peft, transformers, multitask, onnx."]),
    ("--format peft --task moood", ["'moood'. Did you mean 'mood'?"]),
    ("--format onnx --output {bert}", ["holds a checkpoint already"]),
    ("--format onnx --output full", ["'full' is not empty"]),
    ("--format peft --int8", ["--int8", "onnx", "peft"]),
    ("--format onnx --data mood=full", ["--data", "--int8"]),
    ("--format peft", ["'names'", "experts.word_shapes", "transformers or onnx", "--task", "mood"]),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(tmp_path, monkeypatch, bert, refused, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full/below").mkdir(parents=True)
    error = refused(bert, *arguments.format(bert=bert).split())
    assert all(part in error for part in said)


@pytest.mark.parametrize("format", ["peft", "transformers", "onnx"])
def test_what_the_gate_mixes_is_refused(bert, tmp_path, refused, format):
    loaded = load_checkpoint(bert)
    loaded.model.tasks["mood"] = replace(loaded.model.tasks["mood"], joint=True)
    save_checkpoint(tmp_path / "mixed", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    said = refused(tmp_path / "mixed", "--task", "mood", "--format", format)
    assert all(part in said for part in ("cannot be folded", "sparse-ft train --task mood"))


def test_what_cannot_be_exported_is_refused(bert, tmp_path, monkeypatch, make_model, refused):
    modern = saved(tmp_path / "modern", make_model, "modernbert", heads={"mood": ("text", 2)})
    said = refused(modern, "--format", "transformers")
    assert all(part in said for part in ("ModernBertForTokenClassification", "onnx"))
    loaded = load_checkpoint(bert)
    loaded.model.remove_task("mood")
    loaded.model.remove_task("names")
    save_checkpoint(tmp_path / "bare", model=loaded.model, tasks={}, config=loaded.config, metrics={})
    assert "no task" in refused(tmp_path / "bare", "--format", "peft")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    said = refused(bert, "--format", "onnx")
    assert all(part in said for part in ("onnxruntime", 'pip install "sparse-ft[onnx]"'))


def test_a_task_with_one_expert_leaves_a_gated_checkpoint(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS, gate=True)
    result = sparse_ft.export(path, format="peft", task="mood", output=tmp_path / "out")
    assert "The gate of the checkpoint" in (result.path / "README.md").read_text()
    assert "adapter_config.json" in files(result.path)


def test_an_export_that_answers_otherwise_leaves_nothing(tmp_path, monkeypatch, bert, refused):
    folder_module = "sparse_ft.integrations.exporters.transformers_folder"
    monkeypatch.setattr(f"{folder_module}.fold", lambda backbone, expert: None)  # it is forgotten
    said = refused(bert, "--format", "transformers", "--task", "mood")
    assert all(part in said for part in ("'mood'", "differ by", "Nothing was written"))


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, bert):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_ft.integrations.export.model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        sparse_ft.export(bert, format="peft", task="mood", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_tolerance_grows_with_the_logits_and_nan_never_passes():
    Difference(texts=1, answers=1, largest=9e-4, scale=10.0, disagreements=0).check("x")
    for largest, scale in ((9e-4, 1.0), (2e-4, 0.1), (float("inf"), 1.0), (float("nan"), 1.0)):
        with pytest.raises(ExportError, match="differ"):
            Difference(texts=1, answers=1, largest=largest, scale=scale, disagreements=0).check("x")
