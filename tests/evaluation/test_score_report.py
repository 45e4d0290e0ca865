"""Reports as text, Markdown and JSON, and the files that hold them."""

import json
import unicodedata

import pytest

from sparse_ft.errors import SparseFTError
from sparse_ft.evaluation.score_report import TaskReport, report_json, report_markdown, report_text, write_report
from sparse_ft.tasks.kinds.scores import score_classification, score_multi_label, score_tagging


def columns(line):
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


@pytest.fixture
def tagging():
    references = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "O"]]
    predictions = [["B-PER", "I-PER", "O"], ["B-PER", "O", "O"]]
    return score_tagging(references, predictions, labels=["O", "B-PER", "I-PER", "B-LOC"])


@pytest.fixture
def topic():
    references = ["体育", "体育", "财经", "军事 news"] * 500
    predictions = ["体育", "财经", "财经", "军事 news"] * 500
    return score_classification(references, predictions, labels=["体育", "财经", "军事 news"])


@pytest.fixture
def intents():
    labels = [f"intent_{number}" for number in range(150)]
    return score_classification(labels, [*labels[1:], labels[0]], labels=labels)


def test_tagging_report_has_entities_first_then_tags_with_o(tagging):
    text = report_text(tagging, title="ner")
    assert text.startswith("ner (2 sentences)\n=================\nmetrics: f1 0.500  precision 0.500  recall 0.500")
    assert "metrics, per tag: token_accuracy 0.833" in text
    assert text.index("\nentities ") < text.index("\nLOC ") < text.index("\ntags ") < text.index("\nO ")
    assert text.index("\nB-LOC ") < text.index("\naccuracy ")


def test_columns_are_aligned_with_wide_characters(topic):
    lines = report_text(topic, title="话题").splitlines()
    assert columns(lines[0]) == len(lines[1])
    start = next(number for number, line in enumerate(lines) if line.startswith("labels "))
    assert {columns(line) for line in lines[start : start + 9]} == {columns(lines[start])}


def test_classification_report_shows_counts_with_thousands_and_three_decimals(topic):
    text = report_text(topic, title="topic")
    assert "topic (2,000 rows)" in text
    row = next(line for line in text.splitlines() if line.startswith("体育"))
    assert row.split() == ["体育", "1.000", "0.500", "0.667", "1,000"]


def test_confused_pairs_are_the_most_frequent_first():
    references, predictions = ["a"] * 5 + ["b"] * 4, ["a", "a", "b", "b", "b", "b", "b", "b", "a"]
    text = report_text(score_classification(references, predictions, labels=["a", "b"]), title="t")
    lines = text[text.index("most confused") :].splitlines()
    assert [line.split() for line in lines[2:4]] == [["a", "b", "3", "0.600"], ["b", "a", "1", "0.250"]]


def test_long_label_lists_are_shown_in_full(intents):
    for report in (report_text(intents, title="t"), report_markdown(intents, title="t")):
        assert all(f"intent_{number} " in report for number in range(150))


@pytest.mark.parametrize(
    ("num_labels", "in_text", "in_markdown"), [(12, True, True), (13, False, True), (31, False, False)]
)
def test_matrix_is_shown_up_to_a_number_of_labels(num_labels, in_text, in_markdown):
    labels = [f"l{number}" for number in range(num_labels)]
    score = score_classification(labels, labels, labels=labels)
    assert ("reference \\ predicted" in report_text(score, title="t")) is in_text
    assert ("reference \\\\ predicted" in report_markdown(score, title="t")) is in_markdown


def test_matrix_with_long_names_numbers_its_columns():
    labels = [f"a rather long label name {number}" for number in range(8)]
    text = report_text(score_classification(labels, labels, labels=labels), title="t")
    matrix = text[text.index("reference \\ predicted") :].splitlines()
    assert matrix[0].split()[3:] == [str(number) for number in range(1, 9)]
    assert matrix[2].startswith(" 1 a rather long label name 0 ")


def test_out_of_scope_has_its_own_line():
    score = score_classification(["a", "oos"], ["a", "a"], labels=["a", "oos"], out_of_scope="oos")
    text = report_text(score, title="t")
    assert "out of scope (oos): precision 0.000  recall 0.000  accuracy in scope 1.000\n" in text
    assert "oos_recall" not in text


def test_unseen_labels_are_named_with_their_count():
    score = score_classification(["a", "new", "new"], ["a", "a", "a"], labels=["a"])
    assert "not in train, counted as errors: new (2)\n" in report_text(score, title="t")


def test_rows_not_in_train_have_their_own_line(topic):
    rows = score_classification(["a"], ["a"], labels=["a"])
    assert "only the 1 row whose text is not in train: accuracy 1.000" in report_text(
        topic, title="t", unseen_rows=rows
    )
    assert report_json(topic, unseen_rows=rows)["unseen_rows"] == {"n": 1, "metrics": rows.metrics}


def test_multi_label_report_has_the_samples_average():
    score = score_multi_label([["a", "b"], ["b"]], [["a"], ["b"]], labels=["a", "b"])
    text = report_text(score, title="t")
    assert "samples_f1 0.833" in text
    assert "\nsamples avg " in text
    assert "most confused" not in text


@pytest.mark.parametrize("score", [score_classification, score_multi_label, score_tagging])
def test_score_report_of_no_rows(score):
    empty = score([], [], labels=["a"])
    assert "0.000" in report_text(empty, title="t")
    assert "0.000" in report_markdown(empty, title="t")


def test_text_escapes_what_would_break_the_terminal():
    score = score_classification(["a\nb", "\x1b[31m", ""], ["a\nb", "\x1b[31m", ""], labels=[])
    text = report_text(score, title="t")
    assert "\na\\nb " in text
    assert "\n\\x1b[31m " in text
    assert "\n'' " in text


def test_markdown_escapes_labels_and_keeps_its_columns():
    labels = ["a|b", "<i>", "_x_", "card_arrival"]
    markdown = report_markdown(score_classification(labels, labels, labels=labels), title="t")
    table = [line for line in markdown.splitlines() if line.startswith("|")][:6]
    assert len({len(line) for line in table}) == 1
    assert [line.split(" ")[1] for line in table[2:]] == ["a\\|b", "\\<i>", "\\_x\\_", "card_arrival"]
    assert table[1].endswith("-: |")


def test_json_is_the_score(tagging, topic):
    content = report_json(tagging)
    assert list(content) == ["n", "metrics", "report", "token_report"]
    assert content["report"]["PER"]["support"] == 1
    content = report_json(topic)
    assert list(content) == ["n", "metrics", "report", "confusion"]
    assert content["confusion"]["labels"] == ["体育", "财经", "军事 news"]
    assert json.loads(json.dumps(content)) == content


def test_write_report_writes_three_files(tmp_path, tagging, topic):
    tasks = {"ner": TaskReport(tagging), "topic": TaskReport(topic, title="topic, test split")}
    about = {"checkpoint": "runs/all", "split": "test", "route": "gate"}
    paths = write_report(tmp_path / "a" / "b", tasks, about=about, routing={"accuracy": 1.0, "usage": {}})
    assert [path.name for path in paths] == ["report.txt", "report.md", "report.json"]
    assert sorted(tmp_path.joinpath("a", "b").iterdir()) == sorted(paths)
    text, markdown, stored = (path.read_text(encoding="utf-8") for path in paths)
    assert text.startswith("checkpoint: runs/all\nsplit: test\n")
    assert "topic, test split (2,000 rows)" in text
    assert "## ner (2 sentences)" in markdown
    assert "体育" in stored
    content = json.loads(stored)
    assert list(content) == ["checkpoint", "split", "route", "tasks", "routing"]
    assert content["tasks"]["ner"] == report_json(tagging)


def test_pictures_are_written_and_shown_by_the_markdown(tmp_path, tagging):
    paths = write_report(tmp_path, {"ner": TaskReport(tagging)}, pictures={"routing.png": b"PNG"})
    assert [path.name for path in paths] == ["report.txt", "report.md", "report.json", "routing.png"]
    assert (tmp_path / "routing.png").read_bytes() == b"PNG"
    assert (tmp_path / "report.md").read_text().endswith("## Pictures\n\n![routing](routing.png)\n")


def test_write_report_into_a_file_is_refused(tmp_path, tagging):
    target = tmp_path / "taken"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(SparseFTError, match=r"cannot be written to '.*taken': .*Expected a folder"):
        write_report(target, {"ner": TaskReport(tagging)})
    assert target.read_text(encoding="utf-8") == "mine"


def test_failed_write_leaves_the_old_report_and_no_rest(tmp_path, tagging, monkeypatch):
    write_report(tmp_path, {"old": TaskReport(tagging)})

    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(SparseFTError, match="Permission denied"):
        write_report(tmp_path, {"new": TaskReport(tagging)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.txt"]
    assert "old" in (tmp_path / "report.txt").read_text(encoding="utf-8")


def test_half_a_surrogate_pair_in_a_label_can_be_written(tmp_path):
    score = score_classification(["\ud83d"], ["\ud83d"], labels=["\ud83d"])
    path = write_report(tmp_path, {"t": TaskReport(score)})[2]
    assert json.loads(path.read_bytes())["tasks"]["t"]["confusion"]["labels"] == ["\ud83d"]
