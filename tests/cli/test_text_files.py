"""The files that predict reads and writes."""

import csv
import json

import pytest
from toys import call, write_rows

import sparse_ft
from sparse_ft.cli.text_files import read_file
from sparse_ft.errors import DataError

ROWS = [{"id": "01", "text": "the weather, loved", "day": "1"}, {"id": "02", "text": 'half "boring"\nof', "day": ""}]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def write_csv(path, rows=ROWS):
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# Reading


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    write_csv(tmp_path / "rows.csv")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    assert list(read_file(str(tmp_path / "rows.csv"), form="text")) == ROWS
    assert list(read_file(str(tmp_path / "rows.jsonl"), form="text")) == ROWS
    (tmp_path / "rows.tsv").write_text('id\ttext\n1\t"he said ""no"""\n2\t"Ada" met\n', encoding="utf-8")
    rows = [{"id": "1", "text": 'he said "no"'}, {"id": "2", "text": '"Ada" met'}]
    assert list(read_file(str(tmp_path / "rows.tsv"), form="text")) == rows


def test_a_folder_has_one_text_a_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.txt").write_text("Ada\nmet Mozart\n", encoding="utf-8")
    (tmp_path / "one.txt").write_bytes("\ufeffhalf".encode())
    (tmp_path / "notes.md").write_text("not a text")
    rows = [{"file": "b/two.txt", "text": "Ada\nmet Mozart"}, {"file": "one.txt", "text": "half"}]
    assert list(read_file(str(tmp_path), form="text")) == rows


def test_lines_of_pairs_need_no_header(tmp_path):
    (tmp_path / "pairs.tsv").write_text("the table\tthe film\nAda\n")
    assert list(read_file(str(tmp_path / "pairs.tsv"), form="pair")) == [("the table", "the film"), "Ada"]
    (tmp_path / "empty.csv").write_text("")
    assert list(read_file(str(tmp_path / "empty.csv"), form="text")) == []


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", b"review,stars\ngood,5\n", "no column 'text'.*'review,stars"),
    ("a.csv", b"text,text\na,b\n", "names a column twice"),
    ("a.csv", b"id,text\n1,a,b\n", "Row 1 of .* has 3 columns, its header 2"),
    ("a.csv", b'id,text\n1,"a\n', "no CSV"),
    ("a.csv", b"text,routing\na,b\n", "Row 1 of .*field 'routing'"),
    ("a.tsv", b"review\tstars\ngood\t5\n", "no column 'text'"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "Line 2: The field 'text' of a row is '3'"),
    ("a.jsonl", b'{"id": 3}\n', "Line 1: The field 'text' of a row is missing"),
    ("a.jsonl", b'["a"]\n', "Line 1 is no object"),
    ("a.jsonl", b'{"text": "a", "x": NaN}\n', "Line 1.*NaN"),
    ("a.txt", "Ada".encode("utf-16"), "Line 1 of .* is UTF-16"),
    ("a.json", b"[]", "holds no lines of text"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_file(str(tmp_path / name), form="text"))


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no \.txt file"):
        list(read_file(str(tmp_path), form="text"))


# Fields of a row


def test_fields_pass_through_as_they_came(cli, toys, tmp_path):
    rows = [{"id": 7, "text": "the weather loved", "tags": ["a", None], "at": {"x": 1.5}}, {"text": "half", "id": "x"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    code, out, err = cli("predict", toys, "--file", "rows.jsonl", "--task", "mood", "--json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [list(line) for line in lines] == [
        ["id", "tags", "at", "text", "tasks", "routing"],
        ["id", "text", "tasks", "routing"],
    ]
    assert [{key: line[key] for key in row} for line, row in zip(lines, rows, strict=True)] == rows


# Writing


def test_answers_are_written_as_json_lines_or_csv(cli, toys, tmp_path):
    write_csv(tmp_path / "rows.csv")
    code, printed, err = cli("predict", toys, "--file", "rows.csv", "--task", "mood", "--task", "names", "--json")
    assert code == 0, err
    arguments = ["predict", toys, "--file", "rows.csv", "--task", "mood", "--task", "names", "--output"]
    code, out, err = cli(*arguments, "new/answers.jsonl")
    assert (code, out) == (0, "Answers to 2 texts: new/answers.jsonl\n")
    assert (tmp_path / "new/answers.jsonl").read_text(encoding="utf-8") == printed
    assert cli(*arguments, "answers.csv")[0] == 0
    with (tmp_path / "answers.csv").open(newline="", encoding="utf-8") as stream:
        written = list(csv.DictReader(stream))
    answers = [json.loads(line) for line in printed.splitlines()]
    for row, line, answer in zip(ROWS, written, answers, strict=True):
        assert {key: line[key] for key in row} == row
        mood = answer["tasks"]["mood"]
        assert (line["mood"], float(line["mood_score"])) == (mood["label"], mood["score"])
        assert json.loads(line["names"]) == answer["tasks"]["names"]["entities"]


def test_an_output_is_written_whole_or_not_at_all(cli, toys, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": "half loved"}] * 300 + [{"text": 3}])
    (tmp_path / "out.csv").write_text("old")
    for output in ("out.csv", "out.jsonl"):
        code, out, err = cli("predict", toys, "--file", "rows.jsonl", "--task", "mood", "--output", output)
        assert (code, out) == (2, "")
        assert "Line 301" in err
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.csv", "rows.jsonl"]


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "a"}, {"text": "b", "id": 3}], "'id', for which the table has no column"),
    ([{"text": "a", "mood": "good"}], "'mood' of the rows is also the name of a task's column"),
    ([{"text": "a", "tasks": ["about"]}], "'about', for which the table has no column"),
])  # fmt: skip
def test_a_table_that_would_lose_something_is_refused(cli, toys, tmp_path, rows, message):
    write_rows(tmp_path / "rows.jsonl", rows)
    code, _, err = cli("predict", toys, "--file", "rows.jsonl", "--task", "mood", "--output", "out.csv")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(("output", "message"), [
    ("out.txt", "neither .jsonl nor .csv"),
    ("rows.jsonl", "is the file that is read"),
    ("folder.csv", "is a folder"),
])  # fmt: skip
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(cli, tmp_path, output, message):
    write_rows(tmp_path / "rows.jsonl", [{"text": "half"}])
    (tmp_path / "folder.csv").mkdir()
    code, _, err = cli("predict", "no-checkpoint", "--file", "rows.jsonl", "--output", output)
    assert code == 2
    assert message in err


# Tables in memory


def test_a_data_frame_is_answered_row_by_row(toys):
    import pandas

    model = sparse_ft.load(toys, device="cpu")
    frame = pandas.DataFrame({"id": [7, 8], "text": ["the weather loved", "half boring"], "day": ["x", None]})
    answers = model.predict(frame, "mood")
    assert [answer.text for answer in answers] == list(frame["text"])
    assert [answer.fields for answer in answers] == [{"id": 7, "day": "x"}, {"id": 8, "day": None}]
    assert [answer.tasks for answer in answers] == [
        answer.tasks for answer in model.predict(list(frame["text"]), "mood")
    ]
    only = pandas.DataFrame({"id": [7, 8], "review": frame["text"]})
    assert [answer.text for answer in model.stream(only, "mood")] == list(frame["text"])
    assert model.logits(only, "mood").equal(model.logits(list(frame["text"]), "mood"))
    with pytest.raises(DataError, match=r"no column 'text'.*id, title, body"):
        model.predict(pandas.DataFrame({"id": [1], "title": ["a"], "body": ["b"]}), "mood")
    with pytest.raises(DataError, match="'text' of a row is 'None'"):
        model.predict(pandas.DataFrame({"text": ["a", None]}), "mood")
