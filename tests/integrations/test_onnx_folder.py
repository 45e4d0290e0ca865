"""A checkpoint as one ONNX graph gives the same answers in ONNX Runtime."""

import json
import sys

import numpy as np
import pytest
import torch
from toy_checkpoints import LABELS, TEXTS, add_random_expert, assert_close, word_logits, words_of
from toys import write_rows, write_toy
from typer.testing import CliRunner

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.words import word_shape
from sparse_ft.checkpoint.checkpoint import save_checkpoint
from sparse_ft.cli.main import app
from sparse_ft.config import RunConfig
from sparse_ft.errors import ExportError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.integrations.exporters.int8 import int8_scores
from sparse_ft.merging.edit import edit
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import load_task


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
    shapes = [[0 if word is None else word_shape(row[word]) for word in batch.word_ids(index)]
              for index, row in enumerate(words)]  # fmt: skip
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
        for own in ([row % 2 for row in range(len(texts))], [(row + 1) % 2 for row in range(len(texts))]):
            batch, feed = onnx_inputs(tokenizer, words, own)
            feed["word_shapes"][[index for index, expert in enumerate(own) if not expert]] = 0
            found = dict(zip(about["tasks"], session.run(list(about["tasks"]), feed), strict=True))
            tagged = word_logits(torch.from_numpy(found["names"]), batch, words, last=False)
            for index, expert in enumerate(own):
                spaced = " ".join(words[index])
                for task in ("names",) if expert else ("mood", "about"):
                    (ours,) = model.logits([spaced], task)
                    theirs = tagged[index] if task == "names" else found[task][index]
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


def run_card(folder, monkeypatch):
    """Run the example of the folder's README; return its variables."""
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("sys.path", [*sys.path])
    shown = {}
    exec(card.split("```python\n")[1].split("```")[0], shown)
    return shown


def test_the_card_of_a_graph_runs(graph, monkeypatch):
    path, folder, _ = graph
    shown = run_card(folder, monkeypatch)
    ours = sparse_ft.load(path, device="cpu").logits(shown["rows"], "mood")
    assert_close(ours, torch.as_tensor(shown["logits"]))
    assert {"word_shapes", "expert"} <= shown["feed"].keys()


def test_a_graph_of_one_task_with_a_name_of_an_inner_value(tmp_path, monkeypatch, graph):
    path, _, _ = graph
    named = edit(path, copy=[("names", "linear"), ("names", "expert")], output=tmp_path / "named").path
    with pytest.raises(ExportError, match="'expert'"):  # an input
        sparse_ft.export(named, format="onnx", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = sparse_ft.export(named, format="onnx", task="linear", output=tmp_path / "out")
    assert set(result.differences) == {"linear"}
    shown = run_card(result.path, monkeypatch)
    (row,) = shown["rows"]
    ours = sparse_ft.load(path, device="cpu").logits([" ".join(row)], "names")
    assert_close(ours, word_logits(torch.as_tensor(shown["logits"]), shown["batch"], [row], last=False))
    assert "word_shapes" in shown["feed"]
    assert "expert" not in shown["feed"]  # one expert is folded


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
