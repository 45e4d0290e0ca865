"""Rows that are learnt together, and the reading kinds in one run with a classification, from files to answers."""

import json
import random

import pytest
import torch
import yaml
from toy_checkpoints import tensors
from toys import FILLERS, call, run, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.cli.listing import describe_checkpoint
from sparse_ft.config import load_config
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.training_task import prepare_task

ANSWERS = ["Mozart", "Ada Lovelace"]


def passages(number, seed):
    """A person to be found in texts, some longer than a window."""
    generator = random.Random(f"spans/{seed}")
    paragraphs = []
    for index in range(number):
        words = generator.choices(FILLERS, k=generator.choice([3, 5, 50]))
        found = generator.choice(ANSWERS)
        words.insert(generator.randrange(len(words)), found)
        text = " ".join(words)
        answers = [{"text": found, "answer_start": text.index(found)}]
        question = {"id": f"Q{index}", "question": "Who ?", "answers": answers}
        paragraphs.append({"context": text, "qas": [question]})
    return {"data": [{"paragraphs": paragraphs}]}


def dialogues(number, seed):
    """The choice that praises is right; two to four are given."""
    generator = random.Random(f"choices/{seed}")
    rows = []
    for index in range(number):
        wrong = [f"{filler} boring" for filler in generator.sample(FILLERS, k=generator.randint(1, 3))]
        right = f"{generator.choice(FILLERS)} loved"
        choices = generator.sample([*wrong, right], k=len(wrong) + 1)
        question = {"id": index, "question": "What ?", "choice": choices, "answer": right}
        rows.append([generator.choices(FILLERS, k=3), [question], str(index)])
    return rows


def write_reading(folder, *, number=60):
    """Write a task of each reading kind with its data; return the paths of the task files."""
    paths = []
    for name, make, kind, file_format, columns, metric in (
        ("spans", passages, "span_extraction", "squad", {"text": "context", "text_pair": "question"}, "exact_match"),
        ("picks", dialogues, "multiple_choice", "c3",
         {"text": "context", "text_pair": "question", "choices": "choice", "answer": "answer"}, "accuracy"),
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
        for seed, split in enumerate(("train", "validation", "test")):
            content = make(number if seed == 0 else 20, seed)
            (folder / name / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        files = {split: f"{split}.json" for split in ("train", "validation", "test")}
        task = {"name": name, "kind": kind, "files": {"format": file_format, "root": name, **files}, "columns": columns}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**task, "metric": metric}), encoding="utf-8")
        paths.append(str(path))
    return paths


OPTIONS = {"train__epochs": 10, "train__batch_size": 16, "data__max_length": 32, "train__learning_rate": 0.02}


@pytest.fixture(scope="module")
def reader(tmp_path_factory, tiny_bert):
    """A checkpoint of both reading kinds and a classification, trained in one run."""
    folder = tmp_path_factory.mktemp("reading")
    tasks = [*write_reading(folder, number=64), write_toy(folder, "mood", sizes=(96, 16, 16))]
    return run(tasks, tiny_bert, folder / "checkpoint", **OPTIONS)


def prepared(path, tiny_bert, *overrides):
    config = load_config(overrides=["data.max_length=32", *overrides])
    encoder = Encoder(load_backbone(str(tiny_bert)), max_length=32)
    return prepare_task(load_task(path), run=config, encoder=encoder)


def test_choices_and_windows_of_a_row_are_one_group(tmp_path, tiny_bert):
    spans, picks = write_reading(tmp_path)
    mood = prepared(write_toy(tmp_path, "mood"), tiny_bert)
    assert mood.groups == [[index] for index in range(len(mood.examples))]
    for path in (spans, picks):
        task = prepared(path, tiny_bert)
        assert [index for group in task.groups for index in group] == list(range(len(task.examples)))
        rows = [{task.examples[index].row for index in group} for group in task.groups]
        assert [len(found) for found in rows] == [1] * 60
        assert max(map(len, task.groups)) > 2
        for group in task.groups:  # what is right is among what is learnt together
            assert any(target > 0 for index in group for target in task.examples[index].targets)
    assert len(prepared(picks, tiny_bert, "data.train_limit=7").groups) == 7


def test_a_batch_in_parts_learns_what_it_learns_whole(tmp_path, tiny_bert):
    tasks = write_reading(tmp_path, number=16)
    short = {**OPTIONS, "train__epochs": 1, "train__batch_size": 8, "train__learning_rate": 1e-3}
    undivided = tensors(run(tasks, tiny_bert, tmp_path / "undivided", **short).path)
    parts = tensors(run(tasks, tiny_bert, tmp_path / "parts", **short, train__accumulation=4).path)
    assert undivided.keys() == parts.keys()
    for name, value in undivided.items():
        if name.endswith("linear.bias"):  # a softmax over a row does not depend on it: its gradient is noise
            continue
        torch.testing.assert_close(parts[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_the_reading_kinds_are_learnt_together_with_a_classification(reader):
    assert reader.scores["spans"]["exact_match"] >= 0.9
    assert reader.scores["picks"]["accuracy"] >= 0.9
    assert reader.scores["mood"]["accuracy"] >= 0.9
    text = reader.evaluation.to_text()
    assert "exact_match" in text
    shown = describe_checkpoint(reader.path)
    assert "span_extraction" in shown
    assert "multiple_choice" in shown


def test_answers_are_those_of_the_evaluation_and_alone_as_among_others(reader):
    model = sparse_ft.load(reader.path)
    pairs = [(paragraph["context"], "Who ?") for paragraph in passages(20, 2)["data"][0]["paragraphs"]]
    answers = model.predict(pairs, tasks=["spans"])
    for (text, _), prediction in zip(pairs, answers, strict=True):
        span = prediction.tasks["spans"]
        assert text[span["start"] : span["end"]] == span["answer"]
    right = [prediction.tasks["spans"]["answer"] in ANSWERS for prediction in answers]
    assert sum(right) / len(right) == reader.scores["spans"]["exact_match"]
    [alone] = model.predict(pairs[3:4], tasks=["spans"])
    assert alone.tasks["spans"]["answer"] == answers[3].tasks["spans"]["answer"]
    questions = [(" ".join(row[0]), row[1][0]["question"], row[1][0]["choice"]) for row in dialogues(20, 2)]
    chosen = [prediction.tasks["picks"] for prediction in model.predict(questions, tasks=["picks"])]
    assert [answer["label"] for answer in chosen] == [
        question[2][answer["choice"]] for question, answer in zip(questions, chosen, strict=True)
    ]
    assert model.predict(questions[:1])[0].to_dict()["choices"] == questions[0][2]  # the gate knows who reads choices
    assert {name for prediction in model.predict(pairs) for name in prediction.tasks} <= {"spans"}
    assert [tuple(row.shape) for row in model.logits(questions[:1], "picks")] == [(len(questions[0][2]), 1)]


def test_the_command_line_asks_questions_by_tab_and_choices_by_json_lines(reader, tmp_path, monkeypatch, capsys):
    row = {"text": "the table", "text_pair": "What ?", "choices": ["the boring", "six loved"]}
    questions = tmp_path / "questions.txt"
    questions.write_text(json.dumps(row) + "\n", encoding="utf-8")
    code, out, _ = call(monkeypatch, capsys, "predict", reader.path, "--file", questions, "--task", "picks", "--json")
    line = json.loads(out)
    assert (code, line["tasks"]["picks"]["choice"], line["choices"]) == (0, 1, row["choices"])
    code, out, _ = call(monkeypatch, capsys, "predict", reader.path, "the first Mozart of\tWho ?", "--task", "spans")
    assert (code, out.splitlines()[1].split()[:3]) == (0, ["spans", "Mozart", "[10-16]"])
    lines = tmp_path / "questions.jsonl"
    lines.write_text('{"text": "the first Mozart of", "text_pair": "Who ?"}\n', encoding="utf-8")
    code, out, _ = call(monkeypatch, capsys, "predict", reader.path, "--file", lines, "--task", "spans", "--json")
    assert (code, json.loads(out)["tasks"]["spans"]["answer"]) == (0, "Mozart")
    code, out, err = call(
        monkeypatch, capsys, "evaluate", reader.path, "--report", tmp_path / "report", "--json", tmp_path / "s"
    )
    assert (code, err) == (0, "")
    scores = json.loads((tmp_path / "s").read_text(encoding="utf-8"))["tasks"]
    assert scores["spans"]["metrics"] == reader.scores["spans"]
    assert "answer_f1" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("line", "task", "said"), [
    ("the table", "picks", "Line 1"),
    ('{"text": "a", "choice": ["b"]}', "picks", "'picks' reads choices"),
    ('["a"]', "picks", '{"text": "…"}'),
    ('{"text": "a"}', "picks", "'picks' reads choices"),
    ('{"text": "a", "choices": "b"}', "picks", "Line 1"),
    ('{"text": "a", "choices": []}', "picks", "Line 1"),
    ('{"text": "a", "choices": ["b", null]}', "picks", "Line 1"),
    ('{"text": "a", "text_pair": 5, "choices": ["b"]}', "picks", "Line 1"),
    ("caf\udce9", "spans", "not UTF-8"),
    ("the table", "spans", "'spans' reads two texts"),
])  # fmt: skip
def test_questions_that_are_not_such_are_refused(reader, monkeypatch, capsys, line, task, said):
    code, out, err = call(monkeypatch, capsys, "predict", reader.path, line, "--task", task)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
