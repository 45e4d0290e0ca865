"""The bundled tasks, trained briefly on MiniLM, answer what README and docs show, and what a newcomer asks first."""

import ast
import json
import re
from pathlib import Path

import pytest
import sandbox as files
from snippets import ROOT, blocks, sparse_ft_words

import sparse_ft
from sparse_ft import resources
from sparse_ft.cli.main import app

TASKS = ["sentiment", "topic", "intent", "ner"]
SHORT = [
    "experts.first_block=4", "experts.targets=[query, value]", "train.epochs=4", "train.min_steps=0",
    "train.patience=0", "train.batch_size=16", "train.learning_rate=0.005",
]  # fmt: skip
ALL = blocks()
SHOWN = [block for block in ALL if block.language == "output" or block.printed_by]
REMARKED = [block for block in ALL if block.language == "python" and re.search(r"  # [\[{]", block.text)]


@pytest.fixture(scope="module")
def trained(minilm, tmp_path_factory) -> Path:
    """A folder with what the commands read; its checkpoints come from one run on the shortest rows of each sample."""
    folder = tmp_path_factory.mktemp("trained")
    files.write_inputs(folder)
    files.write_bundled(folder / "bundled", lambda rows: sorted(rows, key=len)[: 240 if len(rows) > 400 else 16])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "PACKAGE_DIR", folder / "bundled/package")
        sparse_ft.train(TASKS, output=folder / "runs/all", overrides=SHORT, device="cpu")
    sparse_ft.edit(folder / "runs/all", remove=TASKS[:3], output=folder / "runs/ner")
    return folder


def assert_printed(shown: str, printed: str) -> None:
    """Compare word by word; `…` stands for any text, and scores may lie 0.5 apart."""
    pattern = re.escape(" ".join(shown.split())).replace("\\ …\\ ", "\\ (?:.*\\ )?").replace("…", ".*")
    pattern = re.sub(r"\d+\\\.\d+", r"(\\d+\\.\\d+(?:e-\\d+)?)", pattern)
    same = re.fullmatch(pattern, " ".join(printed.split()))
    assert same, f"printed:\n{printed}\nshown:\n{shown}"
    scores = [float(score) for score in re.findall(r"\d+\.\d+", shown)]
    assert [float(score) for score in same.groups()] == pytest.approx(scores, abs=0.5)


def test_every_output_has_its_command():
    assert len(SHOWN) >= 5
    assert REMARKED
    assert [block.where for block in SHOWN if block.printed_by is None or block.printed_by.reason] == []


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.where)
def test_a_command_prints_what_is_shown(block, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    for words in map(sparse_ft_words, block.printed_by.commands):
        if words[0] != "train":  # its checkpoint is there; `…` stands for what it prints
            app(args=words, prog_name="sparse-ft", standalone_mode=False)
    shown = block.text
    if block.language == "json":
        shown = json.dumps(json.loads(shown), ensure_ascii=False).replace('"…"', "…")
    assert_printed(shown, capsys.readouterr().out)


@pytest.mark.parametrize("block", REMARKED, ids=lambda block: block.where)
def test_an_expression_gives_the_value_beside_it(block, trained, monkeypatch):
    monkeypatch.chdir(trained)
    names, lines = {}, block.text.splitlines()
    for node in ast.parse(block.text).body:
        remark = lines[node.end_lineno - 1].partition("  # ")[2]
        if isinstance(node, ast.Expr) and remark[:1] in {"[", "{"}:
            assert_printed(remark, repr(eval(ast.unparse(node), names)))
        else:
            exec(ast.unparse(node), names)


def test_what_a_newcomer_asks_first_is_answered_rightly(trained):
    """Of 60 plain sentences that are in no split, at least 52 go to an expert that is for them, and are right."""
    lines = (ROOT / "tests/docs/first_hour.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    predictions = sparse_ft.load(trained / "runs/all", device="cpu").predict([row["text"] for row in rows])
    wrong = {
        row["text"]: prediction.tasks
        for row, prediction in zip(rows, predictions, strict=True)
        if not any(answer(prediction, task) == right for task, right in row["answers"].items())
    }
    samples = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tasks/data").glob("*/*.tsv"))
    assert not [row["text"] for row in rows if f"{row['text']}\t" in samples]
    assert len(rows) == 60
    assert len(wrong) <= 8, wrong


def answer(prediction: sparse_ft.Prediction, task: str) -> object:
    """Return the label, or types and texts of the entities; None if another task was answered."""
    given = prediction.tasks.get(task)
    if given is None:
        return None
    return given["label"] if "label" in given else [[entity["type"], entity["text"]] for entity in given["entities"]]
