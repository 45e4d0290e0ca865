"""The benchmark command and the peers that it trains, on a tiny backbone and the bundled samples."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.resources import bundled_dir
from sparse_ft.tasks.spec import load_task

FEW = ("data.train_limit=40", "train.epochs=1", "train.min_steps=0", "gate.rows=40")

pytestmark = pytest.mark.benchmarks


def call(*arguments: str | Path) -> None:
    import benchmark
    import script

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        script.run(benchmark.main)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmark") / "results.jsonl"


@pytest.fixture(scope="module")
def options(tiny_bert, results) -> list[str | Path]:
    """Run every method on one task, and two of them on another; return the options of both calls."""
    import benchmark

    arguments = [
        *("--data-root", bundled_dir("tasks") / "data", "--backbone", tiny_bert, "--seeds", "13", "--threads", "1"),
        *(word for setting in FEW for word in ("--set", setting)),
        *("--results", results),
    ]
    call("intent", "--methods", ",".join(benchmark.METHODS), *arguments)
    call("intent,ner", "--methods", "expert,full", *arguments)
    return arguments


@pytest.fixture(scope="module")
def entries(options, results) -> dict[tuple[str, str], dict]:
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(found) == len({(entry["task"], entry["method"]) for entry in found}), "something was run twice"
    return {(entry["task"], entry["method"]): entry for entry in found}


def test_every_method_is_scored_on_test(entries):
    import benchmark

    expected = {("intent", method) for method in benchmark.METHODS} | {("ner", "expert"), ("ner", "full")}
    assert set(entries) == expected
    for (task, _), entry in entries.items():
        assert entry["scored_on"] == {"intent": "test, 160 rows", "ner": "test, 130 rows"}[task]
        assert 0 <= entry["headline"] == entry["metrics"][entry["metric"]] <= 1


def test_trained_parameters_are_those_of_the_method(entries, tiny_bert):
    bare = sum(value.numel() for value in load_backbone(str(tiny_bert)).model.parameters())
    trained = {method: entry["trainable"] for (task, method), entry in entries.items() if task == "intent"}
    hidden, labels = 32, len(load_task("intent").label_names)
    assert trained["full_pooled"] == bare + hidden * labels + labels
    assert trained["full"] - trained["full_pooled"] == hidden * hidden + hidden  # the pooler
    assert trained["head"] < trained["bitfit"] < trained["full"]
    assert trained["mixture"] == trained["expert"] < trained["full"]


def test_what_is_there_is_not_run_again(options, tmp_path, capsys, monkeypatch):
    import benchmark

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(benchmark, "run_trainer", never)
    monkeypatch.setattr(benchmark.sparse_ft, "train", never)
    pages = ("--plot", tmp_path / "plot.png", "--append", tmp_path / "results.md")
    call("intent,ner", "--methods", "expert,full", *options, *pages)
    printed, written = capsys.readouterr().out, (tmp_path / "results.md").read_text()
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 3 * 2  # a header; each method on two tasks, and its mean
    assert all(row in written for row in rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["intent", "--methods", "ful"], "Unknown method 'ful'. Did you mean 'full'?"),
        (["intent", "--seeds", "13,x"], "'13,x' should be whole numbers separated by commas"),
        (["intents"], "Did you mean 'intent'"),
        (["clue"], "No task of CLUE has its data"),
        (["clue/cmrc2018", "--methods", "full"], "'full' is for classification and token_classification"),
    ],
)
def test_mistakes_are_explained(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(*arguments, "--data-root", tmp_path, "--results", tmp_path / "results.jsonl")
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_kept_checkpoint_is_told_by_the_commit_that_trained_it(options, tmp_path, monkeypatch):
    import benchmark

    kept, found = ["--keep", tmp_path / "keep"], []
    for name, commit in (("first", "commit one"), ("second", "commit two")):
        monkeypatch.setattr(benchmark, "about", lambda commit=commit: commit)
        call("intent", "--methods", "expert", *options, *kept, "--results", tmp_path / name)
        monkeypatch.setattr(benchmark.sparse_ft, "train", None)  # the second only scores
        found.append(json.loads((tmp_path / name).read_text()))
    assert [entry["about"] for entry in found] == ["commit one", "commit one"]
    assert found[0]["metrics"] == found[1]["metrics"]


def test_a_task_with_few_rows_is_learnt_alone_and_mixed(toys, tmp_path, monkeypatch, capsys):
    import few_shot
    import script

    options = ["--base", toys, "--data-root", bundled_dir("tasks") / "data", "--tasks", "topic", "--rows", "2"]
    options += ["--seeds", "13", "--threads", "1", "--results", tmp_path / "few.jsonl", "--methods", "alone,by token"]
    options += [word for setting in FEW[1:3] for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *map(str, options)])
    script.run(few_shot.main)
    assert [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines() if "topic" in line] == [
        "alone",
        "by token",
    ]


def test_a_line_that_a_kill_tore_is_no_result(tmp_path):
    from runs import Runs

    runs = Runs(tmp_path / "results.jsonl")
    runs.add({"seed": 13}, {"score": 0.5})
    whole = runs.path.read_text()
    runs.path.write_text(whole + whole[: len(whole) // 2])
    assert [entry["score"] for entry in runs.find({"seed": 13})] == [0.5]
    runs.add({"seed": 14}, {"score": 0.25, "about": "elsewhere"})
    assert runs.path.read_text().startswith(whole)
    assert [(entry["score"], entry["about"]) for entry in runs.find({"seed": 14})] == [(0.25, "elsewhere")]


def test_a_peer_scores_spans_of_characters(tiny_bert, tmp_path):
    import trainer_peers

    rows = [{"text": "Ada met Bob", "entities": [{"start": 0, "end": 3, "type": "PER"}]}] * 4
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"format": "jsonl", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    columns = {"text": "text", "spans": "entities"}
    content = {"name": "people", "kind": "token_classification", "language": "en", "files": files, "columns": columns}
    task = tmp_path / "people.yaml"
    task.write_text(json.dumps({**content, "metric": "f1"}))
    found = trainer_peers.run_trainer("head", str(task), tmp_path, 13, [], epochs=1, backbone=str(tiny_bert))
    assert found["scored_on"] == "test, 4 rows"
    assert 0 <= found["headline"] <= found["metrics"]["token_accuracy"] <= 1


def test_a_pooled_classifier_reads_no_padding_and_trains_all_weights(tiny_bert):
    from trainer_peers import _PooledClassifier

    torch.manual_seed(0)
    model = _PooledClassifier(load_backbone(str(tiny_bert)), 3).eval()
    ids = torch.randint(5, 40, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    found = model(ids, mask, labels=torch.tensor([0, 2]))
    alone = model(ids[1:, :5], mask[1:, :5])
    torch.testing.assert_close(found.logits[1:], alone.logits)
    found.loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.backbone.encoder.parameters())
