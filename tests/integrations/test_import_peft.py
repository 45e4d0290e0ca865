"""LoRAs of PEFT as checkpoints: ours come back as they were, of others what can be said here."""

import json
import re

import pytest
import torch
from toy_checkpoints import LABELS, TEXTS, without_shapes, wrap
from toys import call

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import BackboneError, CheckpointError, ConfigError
from sparse_ft.integrations import import_peft as importing
from sparse_ft.integrations.import_peft import import_adapter
from sparse_ft.tasks.spec import parse_task

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


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_was_exported_comes_back_bit_by_bit(tmp_path, monkeypatch, capsys, make_model, family):
    path = without_shapes(tmp_path / "first", make_model, family)
    sparse_ft.export(path, format="peft", output=tmp_path / "out")
    before = sparse_ft.load(path, device="cpu")
    for task in before.tasks:
        again = tmp_path / f"again-{task}"
        code, out, err = call(monkeypatch, capsys, "import", tmp_path / "out" / task, "--output", again)
        assert code == 0, err
        assert out.startswith(f"Imported expert {task!r}, which serves task {task!r}.\n\nCheckpoint: ")
        after = sparse_ft.load(again, device="cpu")
        assert list(after.tasks) == [task]
        assert after.tasks[task] == before.tasks[task]
        pairs = zip(before.logits(TEXTS, task), after.logits(TEXTS, task), strict=True)
        assert all(torch.equal(*both) for both in pairs)
    renamed = import_adapter(tmp_path / "out" / "mood", task="humour", output=tmp_path / "renamed")
    assert (renamed.expert, renamed.task) == ("humour", "humour")
    assert sparse_ft.load(tmp_path / "renamed").predict(TEXTS[:1], ["humour"])


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
    for place, row in enumerate(words):
        first = [batch.word_ids(place).index(number) for number in range(len(row))]
        expected = logits[place, first][:, [TAGS.index(tag) for tag in ours]]
        (found,) = model.logits([" ".join(row)], "tagger")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_text_classifier_of_a_causal_backbone_is_imported(tmp_path, tiny_folder, family):
    labels = ["bad", "so so", "good"]
    theirs = foreign(tmp_path / "judge", tiny_folder, family, task_type="SEQ_CLS", labels=labels)
    assert import_adapter(tmp_path / "judge", output=tmp_path / "out").task == "judge"
    model = sparse_ft.load(tmp_path / "out", device="cpu")
    assert model.tasks["judge"].label_names == labels
    for text in TEXTS[:3]:
        with torch.no_grad():  # one text at a time: GPT-2 and Llama have no token to pad with
            expected = theirs(**model.encoder.tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(model.logits([text], "judge"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "task_type"), [("bert", "SEQ_CLS"), ("modernbert", "TOKEN_CLS")])
def test_a_head_that_ours_cannot_express_is_left_out_and_said(tmp_path, tiny_folder, family, task_type):
    labels = TAGS if task_type == "TOKEN_CLS" else ["bad", "good"]
    foreign(tmp_path / "theirs", tiny_folder, family, task_type=task_type, labels=labels)
    result = import_adapter(tmp_path / "theirs", output=tmp_path / "out")
    assert result.task is None
    assert result.notes[0].startswith(
        "Not imported, because it stands behind the blocks (a head or pooler): classifier"
    )
    loaded = load_checkpoint(tmp_path / "out")
    assert (loaded.model.experts.names, loaded.tasks) == (["theirs"], {})


def test_labels_come_from_the_command_line_or_a_task_file(tmp_path, tiny_folder):
    foreign(tmp_path / "theirs", tiny_folder, "bert", task_type="TOKEN_CLS", labels=TAGS, config=False)
    bare = import_adapter(tmp_path / "theirs", output=tmp_path / "bare")
    assert bare.task is None
    assert bare.notes[-1] == "Its head has 5 outputs; --labels may name them."
    named = import_adapter(tmp_path / "theirs", labels=TAGS, task="places", output=tmp_path / "named")
    assert named.task == "places"
    (tmp_path / "own.yaml").write_text("{name: own, kind: token_classification, labels: [PER, LOC], metric: f1}")
    import_adapter(tmp_path / "theirs", labels=TAGS, task=str(tmp_path / "own.yaml"), output=tmp_path / "own")
    ours, theirs = load_checkpoint(tmp_path / "own"), load_checkpoint(tmp_path / "named")
    assert ours.tasks["own"] == parse_task(
        {"name": "own", "kind": "token_classification", "labels": ["PER", "LOC"], "metric": "f1"}, where=""
    )
    order = [0, 3, 4, 1, 2]  # O, PER, LOC there; O, LOC, PER here
    weight = theirs.model.head("places").linear.weight
    assert torch.equal(ours.model.head("own").linear.weight, weight[order])


def test_an_export_takes_another_name_also_one_of_a_bundled_task(tmp_path, make_model):
    path = without_shapes(tmp_path / "first", make_model, "bert")
    sparse_ft.export(path, format="peft", task="mood", output=tmp_path / "out")
    result = import_adapter(tmp_path / "out", task="sentiment", output=tmp_path / "again")
    assert (result.task, result.expert) == ("sentiment", "sentiment")
    loaded = load_checkpoint(tmp_path / "again")
    assert loaded.tasks["sentiment"].labels == LABELS["mood"]
    ours, theirs = (sparse_ft.load(folder, device="cpu") for folder in (path, tmp_path / "again"))
    for one, other in zip(ours.logits(TEXTS, "mood"), theirs.logits(TEXTS, "sentiment"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--labels", "O,B-PER,"], "--labels 'O,B-PER,' has an empty name."),
    (["--labels", "O, B-PER"], "The head has 5 outputs, but 2 labels are named: O, B-PER."),
    (["--labels", "O,B-PER"], "The head has 5 outputs, but 2 labels are named: O, B-PER."),
    (["--labels", "O,B-PER,I-PER,E-PER,S-PER"], "are not those of a token_classification here, O, B-PER, I-PER."),
    (["--labels", "O,B-PER,I-PER,B-LOC,I-LOC", "--task", "a b"], "The name 'a b' is not allowed"),
    (["--task", "sentiment"], "Task 'sentiment' is a classification, but the adapter is of a token_classification."),
    (["--backbone", "minlm"], "Unknown backbone 'minlm'. Did you mean 'minilm'?"),
    (["--output", "theirs"], "is not empty and no checkpoint. Choose another --output"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, capsys, tiny_folder, arguments, said):
    monkeypatch.chdir(tmp_path)
    foreign(tmp_path / "theirs", tiny_folder, "bert", task_type="TOKEN_CLS", labels=TAGS, config=False)
    output = [] if "--output" in arguments else ["--output", "out"]
    code, out, err = call(monkeypatch, capsys, "import", "theirs", *output, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter_says_where_one_is(tmp_path, make_model):
    path = without_shapes(tmp_path / "first", make_model, "bert")
    sparse_ft.export(path, format="peft", output=tmp_path / "out")
    both = f"Give one of {tmp_path / 'out' / 'mood'}, {tmp_path / 'out' / 'names'}."
    with pytest.raises(CheckpointError, match=re.escape(both)):
        import_adapter(tmp_path / "out", output=tmp_path / "again")
    with pytest.raises(
        CheckpointError, match=r"holds no adapter_config\.json\. It is a checkpoint, which needs no import"
    ):
        import_adapter(path, output=tmp_path / "again")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json\. Give a folder that PEFT wrote\."):
        import_adapter(tmp_path / "empty", output=tmp_path / "again")


@pytest.mark.parametrize("names", [["x", "y"], {"a": "x"}])
def test_names_of_labels_that_are_none_are_refused(tmp_path, tiny_folder, names):
    foreign(tmp_path / "theirs", tiny_folder, "bert", task_type="TOKEN_CLS", labels=TAGS)
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": names}))
    with pytest.raises(CheckpointError, match="Expected a name for each number from 0"):
        import_adapter(tmp_path / "theirs", output=tmp_path / "out")


def test_an_export_keeps_its_labels_under_a_task_file_of_another_order(tmp_path, make_model):
    path = without_shapes(tmp_path / "first", make_model, "bert")
    sparse_ft.export(path, format="peft", task="mood", output=tmp_path / "out")
    own = tmp_path / "own.yaml"
    own.write_text("{name: own, kind: classification, labels: [good, bad], metric: accuracy}")
    import_adapter(tmp_path / "out", task=str(own), output=tmp_path / "again")
    ours, theirs = sparse_ft.load(path, device="cpu"), sparse_ft.load(tmp_path / "again", device="cpu")
    assert torch.equal(theirs.logits(TEXTS, "own"), ours.logits(TEXTS, "mood").flip(-1))
    assert theirs.tasks["own"].label_names == ours.tasks["mood"].label_names[::-1] == ["good", "bad"]


def test_the_revision_of_a_backbone_travels_with_an_adapter(tmp_path, make_model, monkeypatch):
    path = without_shapes(tmp_path / "first", make_model, "bert")
    model = sparse_ft.load(path, device="cpu")
    model.checkpoint.model.backbone.revision = "abc123"
    sparse_ft.export(model, format="peft", task="mood", output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "abc123"
    asked, load = [], importing.load_backbone

    def watched(name, *, revision, expected_sha256):
        asked.append(revision)
        return load(name, revision=revision, expected_sha256=expected_sha256)

    monkeypatch.setattr(importing, "load_backbone", watched)
    import_adapter(tmp_path / "out", output=tmp_path / "again")
    name = model.checkpoint.model.backbone.name
    import_adapter(tmp_path / "out", backbone=name, output=tmp_path / "elsewhere")
    assert asked == ["abc123", None]


def test_a_damaged_record_is_refused(tmp_path, make_model):
    path = without_shapes(tmp_path / "first", make_model, "bert")
    sparse_ft.export(path, format="peft", task="mood", output=tmp_path / "out")
    file = tmp_path / "out" / "export.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in record.items() if key != "pooling"}))
    with pytest.raises(
        CheckpointError, match=r"export.json' is damaged: KeyError\('pooling'\)\. Export the checkpoint"
    ):
        import_adapter(tmp_path / "out", output=tmp_path / "again")
    for damage in ({"max_length": "x"}, {"max_length": 4}, {"pooling": "max"}):
        file.write_text(json.dumps({**record, **damage}))
        with pytest.raises(CheckpointError, match=r"export.json' is damaged: "):
            import_adapter(tmp_path / "out", output=tmp_path / "again")
    other = {**record["backbone"], "weights_sha256": "0" * 64}
    file.write_text(json.dumps({**record, "backbone": other}))
    with pytest.raises(BackboneError, match="is not that of the checkpoint's backbone"):
        import_adapter(tmp_path / "out", output=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_dora_and_what_is_no_adapter_are_refused(tmp_path, tiny_folder):
    foreign(tmp_path / "dora", tiny_folder, "bert", task_type="TOKEN_CLS", labels=TAGS, use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA also rescales the frozen weight"):
        import_adapter(tmp_path / "dora", output=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"'.*nothing' does not exist\. Give a folder that PEFT wrote"):
        import_adapter(tmp_path / "nothing", output=tmp_path / "out")
    file = tmp_path / "dora" / "adapter_config.json"
    nameless = {**json.loads(file.read_text()), "use_dora": False, "base_model_name_or_path": None}
    file.write_text(json.dumps(nameless))
    with pytest.raises(ConfigError, match=r"does not name its backbone\. Name it with --backbone"):
        import_adapter(tmp_path / "dora", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
