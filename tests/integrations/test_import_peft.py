"""LoRAs of PEFT as checkpoints: our exports come back as they were, of others everything that fits."""

import json
import re
import shutil

import pytest
import torch
from toy_checkpoints import LABELS, TEXTS, without_shapes, wrap
from toys import call

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import BackboneError, CheckpointError, ConfigError
from sparse_ft.integrations import import_peft as importing
from sparse_ft.integrations.import_peft import import_adapter

TAGS = ["B-LOC", "O", "I-PER", "B-PER", "I-LOC"]


def foreign(folder, tiny_folder, family, *, task_type, labels, config=True, **settings):
    """A LoRA of PEFT with a random head, and the model that it was saved from."""
    kinds = {"TOKEN_CLS": "AutoModelForTokenClassification", "SEQ_CLS": "AutoModelForSequenceClassification"}
    targets = {"bert": ["query", "dense"], "gpt2": ["c_attn"], "llama": ["q_proj"], "modernbert": ["Wqkv"]}[family]
    from transformers import AutoConfig

    base = tiny_folder(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = wrap(base, auto=kinds[task_type], task_type=task_type, r=3, target_modules=targets,
                      num_labels=len(labels), fan_in_fan_out=family == "gpt2", **settings)  # fmt: skip
    theirs.save_pretrained(folder)
    if config:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: at for at, name in enumerate(labels)}}
        AutoConfig.from_pretrained(base, **names).save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def bert(tmp_path_factory, make_model):
    """A checkpoint whose experts PEFT can express; read-only."""
    return without_shapes(tmp_path_factory.mktemp("bert"), make_model, "bert")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bert):
    """Its export; read-only."""
    return sparse_ft.export(bert, format="peft", output=tmp_path_factory.mktemp("exported") / "out").path


@pytest.fixture(scope="module")
def tagger(tmp_path_factory, tiny_folder):
    """A tagger of PEFT whose labels nobody wrote down; read-only."""
    folder = tmp_path_factory.mktemp("foreign") / "theirs"
    foreign(folder, tiny_folder, "bert", task_type="TOKEN_CLS", labels=TAGS, config=False)
    return folder


def assert_same_logits(before, after, task, *, as_task=None):
    for one, other in zip(before.logits(TEXTS, task), after.logits(TEXTS, as_task or task), strict=True):
        assert torch.equal(one, other)


def test_an_export_comes_back_bit_by_bit(tmp_path, monkeypatch, capsys, bert, exported):
    before = sparse_ft.load(bert, device="cpu")
    for task in before.tasks:
        code, out, err = call(monkeypatch, capsys, "import", exported / task, "--output", tmp_path / task)
        assert code == 0, err
        assert out.startswith(f"Imported expert {task!r}, which serves task {task!r}.\n\nCheckpoint: ")
        after = sparse_ft.load(tmp_path / task, device="cpu")
        assert list(after.tasks) == [task]
        assert after.tasks[task] == before.tasks[task]
        assert_same_logits(before, after, task)


def test_an_export_takes_another_name_also_one_of_a_bundled_task(tmp_path, bert, exported):
    result = import_adapter(exported / "mood", task="sentiment", output=tmp_path / "again")
    assert (result.task, result.expert) == ("sentiment", "sentiment")
    after = sparse_ft.load(tmp_path / "again", device="cpu")
    assert after.tasks["sentiment"].labels == LABELS["mood"]
    assert_same_logits(sparse_ft.load(bert, device="cpu"), after, "mood", as_task="sentiment")


def test_an_export_keeps_its_labels_under_a_task_file_of_another_order(tmp_path, bert, exported):
    own = tmp_path / "own.yaml"
    own.write_text("{name: own, kind: classification, labels: [good, bad], metric: accuracy}")
    import_adapter(exported / "mood", task=str(own), output=tmp_path / "again")
    ours, theirs = sparse_ft.load(bert, device="cpu"), sparse_ft.load(tmp_path / "again", device="cpu")
    assert torch.equal(theirs.logits(TEXTS, "own"), ours.logits(TEXTS, "mood").flip(-1))
    assert theirs.tasks["own"].label_names == ["good", "bad"]


def test_the_revision_of_a_backbone_travels_with_an_adapter(tmp_path, bert, monkeypatch):
    model = sparse_ft.load(bert, device="cpu")
    model.checkpoint.model.backbone.revision = "abc123"
    sparse_ft.export(model, format="peft", task="mood", output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "abc123"
    requested, load = [], importing.load_backbone

    def watched(name, *, revision, expected_sha256):
        requested.append(revision)
        return load(name, revision=revision, expected_sha256=expected_sha256)

    monkeypatch.setattr(importing, "load_backbone", watched)
    import_adapter(tmp_path / "out", output=tmp_path / "again")
    name = model.checkpoint.model.backbone.name
    import_adapter(tmp_path / "out", backbone=name, output=tmp_path / "elsewhere")
    assert requested == ["abc123", None]


def test_a_foreign_tagger_is_imported_with_its_tags_in_our_order(tmp_path, tiny_folder):
    theirs = foreign(tmp_path / "tagger", tiny_folder, "bert", task_type="TOKEN_CLS", labels=TAGS)
    result = import_adapter(tmp_path / "tagger", output=tmp_path / "out")
    assert (result.expert, result.task, result.notes) == ("tagger", "tagger", [])
    model = sparse_ft.load(tmp_path / "out", device="cpu")
    assert model.tasks["tagger"].label_names == ["LOC", "PER"]
    ours = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    words = [["the", "film"], ["music"]]
    batch = model.encoder.tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**batch).logits
    for index, row in enumerate(words):
        first = [batch.word_ids(index).index(word) for word in range(len(row))]
        expected = logits[index, first][:, [TAGS.index(tag) for tag in ours]]
        (imported,) = model.logits([" ".join(row)], "tagger")
        torch.testing.assert_close(imported, expected, atol=1e-5, rtol=1e-5)


def test_the_text_classifier_of_a_causal_backbone_is_imported(tmp_path, tiny_folder):
    labels = ["bad", "so so", "good"]
    theirs = foreign(tmp_path / "judge", tiny_folder, "gpt2", task_type="SEQ_CLS", labels=labels)
    assert import_adapter(tmp_path / "judge", output=tmp_path / "out").task == "judge"
    model = sparse_ft.load(tmp_path / "out", device="cpu")
    assert model.tasks["judge"].label_names == labels
    for text in TEXTS[:3]:
        with torch.no_grad():  # one text at a time: GPT-2 has no token to pad with
            expected = theirs(**model.encoder.tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(model.logits([text], "judge"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "task_type"), [("bert", "SEQ_CLS"), ("modernbert", "TOKEN_CLS")])
def test_a_head_that_ours_cannot_express_is_left_out_and_said(tmp_path, tiny_folder, family, task_type):
    labels = TAGS if task_type == "TOKEN_CLS" else ["bad", "good"]
    foreign(tmp_path / "theirs", tiny_folder, family, task_type=task_type, labels=labels)
    result = import_adapter(tmp_path / "theirs", output=tmp_path / "out")
    assert result.task is None
    assert "classifier" in result.notes[0]
    loaded = load_checkpoint(tmp_path / "out")
    assert (loaded.model.experts.names, loaded.tasks) == (["theirs"], {})


def test_labels_come_from_the_command_line_or_a_task_file(tmp_path, tagger):
    bare = import_adapter(tagger, output=tmp_path / "bare")
    assert bare.task is None
    assert "5 outputs" in bare.notes[-1]
    import_adapter(tagger, labels=TAGS, task="places", output=tmp_path / "named")
    (tmp_path / "own.yaml").write_text("{name: own, kind: token_classification, labels: [PER, LOC], metric: f1}")
    import_adapter(tagger, labels=TAGS, task=str(tmp_path / "own.yaml"), output=tmp_path / "own")
    ours, theirs = load_checkpoint(tmp_path / "own"), load_checkpoint(tmp_path / "named")
    assert ours.tasks["own"].label_names == ["PER", "LOC"]
    order = [0, 3, 4, 1, 2]  # O, PER, LOC there; O, LOC, PER here
    weight = theirs.model.head("places").linear.weight
    assert torch.equal(ours.model.head("own").linear.weight, weight[order])


# What is refused


@pytest.mark.parametrize(("arguments", "said"), [
    (["--labels", "O,B-PER,"], "'O,B-PER,'"),
    (["--labels", "O, B-PER"], "5 outputs, but 2 labels are named: O, B-PER."),
    (["--labels", "O,B-PER,I-PER,E-PER,S-PER"], "O, B-PER, I-PER."),
    (["--labels", "O,B-PER,I-PER,B-LOC,I-LOC", "--task", "a b"], "'a b'"),
    (["--task", "sentiment"], "'sentiment' is a classification"),
    (["--backbone", "minlm"], "'minlm'. Did you mean 'minilm'?"),
    (["--output", "theirs"], "'theirs' is not empty"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, tagger, arguments, said):
    shutil.copytree(tagger, tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    output = [] if "--output" in arguments else ["--output", "out"]
    code, out, err = call(monkeypatch, capsys, "import", "theirs", *output, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert said in err
    assert not (tmp_path / "out").exists()


def changed(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


OTHER = {"backbone": {"weights_sha256": "0" * 64}}


@pytest.mark.parametrize(("name", "changes", "error", "message"), [
    ("export.json", {"pooling": ...}, CheckpointError, r"export.json' is damaged: KeyError\('pooling'\)"),
    ("export.json", {"max_length": "x"}, CheckpointError, "export.json' is damaged"),
    ("export.json", {"max_length": 4}, CheckpointError, "export.json' is damaged"),
    ("export.json", {"pooling": "max"}, CheckpointError, "export.json' is damaged"),
    ("export.json", OTHER, BackboneError, "the checkpoint's backbone"),
    ("adapter_config.json", {"use_dora": True}, CheckpointError, "DoRA"),
    ("adapter_config.json", {"base_model_name_or_path": None}, ConfigError, "--backbone"),
])  # fmt: skip
def test_damaged_and_other_adapters_are_refused(tmp_path, exported, tagger, name, changes, error, message):
    shutil.copytree(exported / "mood" if name == "export.json" else tagger, tmp_path / "theirs")
    file = tmp_path / "theirs" / name
    if "backbone" in changes:
        changes = {"backbone": {**json.loads(file.read_text())["backbone"], **changes["backbone"]}}
    changed(file, **changes)
    with pytest.raises(error, match=message):
        import_adapter(tmp_path / "theirs", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["x", "y"], {"a": "x"}])
def test_names_of_labels_that_are_none_are_refused(tmp_path, tagger, names):
    shutil.copytree(tagger, tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": names}))
    with pytest.raises(CheckpointError, match="a name for each number from 0"):
        import_adapter(tmp_path / "theirs", output=tmp_path / "out")


def test_a_folder_without_an_adapter_says_where_one_is(tmp_path, bert, exported):
    (tmp_path / "empty").mkdir()
    for path, said in (
        (exported, f"{exported / 'mood'}, {exported / 'names'}"),
        (bert, "needs no import"),
        (tmp_path / "empty", "PEFT"),
        (tmp_path / "nothing", "nothing' does not exist"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            import_adapter(path, output=tmp_path / "again")
