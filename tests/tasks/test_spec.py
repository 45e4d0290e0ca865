import re

import pytest

from sparse_ft.errors import ConfigError
from sparse_ft.resources import bundled_dir
from sparse_ft.tasks.schemes import SCHEMES
from sparse_ft.tasks.spec import list_tasks, load_task, parse_task

SAMPLES = ["sentiment", "topic", "intent", "ner"]
METRICS = {
    "classification": "accuracy",
    "token_classification": "f1",
    "span_extraction": "exact_match",
    "multiple_choice": "accuracy",
}


def test_tasks_are_listed():
    assert set(SAMPLES) | {"conll2003", "sst2", "clue/cmrc2018", "clue/c3"} <= set(list_tasks())
    assert len(list_tasks()) >= 27


@pytest.mark.parametrize("name", list_tasks())
def test_a_bundled_task_is_complete(name):
    spec, file = load_task(name), bundled_dir("tasks") / f"{name}.yaml"
    assert spec.name == name.rpartition("/")[2]  # a task is called so in a checkpoint, where names have no folders
    assert spec.metric == METRICS[spec.kind]
    assert spec.label_scheme in SCHEMES
    assert spec.language in {"en", "zh"}
    assert all((spec.description, spec.example, spec.license, spec.source, spec.files.train, spec.files.test))
    assert set(spec.files.unlabelled) <= {"test"}
    labels = list(spec.labels.values()) if isinstance(spec.labels, dict) else spec.label_names or []
    assert len(set(labels)) == len(labels)
    assert all(rows == sorted(set(rows)) for rows in spec.leaks.values())
    if name in SAMPLES:
        assert spec.files.root == str((bundled_dir("tasks") / "data" / name).resolve())
        assert (spec.hub, spec.license) == (None, "CC0-1.0")
    else:
        assert spec.files.root is None  # public tasks hold no data
    lines = file.read_text(encoding="utf-8").split("\n")
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 140
    assert not [line for line in lines if re.search(r"(?<!https:)(?<!http:)(/work|/home|/tmp|/root)\b", line)]


def test_task_file_of_the_user(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nkind: classification\nmetric: accuracy\nlabels: {0: no, true: yes}\n"
        "drop_labels: [off, on, true, true news, falsehood]\n"
        "files: {format: csv, root: data}\n",
        encoding="utf-8",
    )
    spec = load_task(path)
    assert spec.labels == {"0": "no", "true": "yes"}
    assert spec.drop_labels == ["off", "on", "true", "true news", "falsehood"]
    assert spec.files.root == str((tmp_path / "data").resolve())


@pytest.mark.parametrize(("content", "message"), [
    (b"a: [", "is not readable YAML"),
    (b"\xff", "is not UTF-8"),
    (b"", r"mine\.yaml' must hold a mapping"),
    (b"[]", r"mine\.yaml' must hold a mapping"),
    (b"text", r"mine\.yaml' must hold a mapping"),
    (None, r"mine\.yaml' does not exist"),
])  # fmt: skip
def test_a_file_that_is_no_task_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_task(path)


def test_an_unknown_name_is_refused_with_the_closest_one():
    with pytest.raises(ConfigError, match=r"Unknown task 'conll2030'. Did you mean 'conll2003'?"):
        load_task("conll2030")


def test_all_problems_are_told_at_once():
    values = {"name": "mine", "metrik": "accuracy", "files": {"format": "docx", "trian": "a"}}
    with pytest.raises(ConfigError) as caught:
        parse_task(values, where="mine.yaml")
    text = str(caught.value)
    assert "\n" not in text
    suggested = ("Did you mean 'metric'?", "Did you mean 'files.train'?")
    for said in ("'mine.yaml'", "files.format", "'docx'", "kind: Field", *suggested):
        assert said in text


def test_label_names_keep_their_order():
    base = {"name": "mine", "kind": "classification", "metric": "accuracy"}
    assert parse_task({**base, "labels": ["b", 1, True]}, where="x").label_names == ["b", "1", "true"]
    assert parse_task({**base, "labels": {1: "b", 2: "a", 3: "b"}}, where="x").label_names == ["b", "a"]
    assert parse_task(base, where="x").label_names is None


@pytest.mark.parametrize(("line", "said"), [
    ("labels: [null, spam]", "labels: null is no label"),
    ("labels: {a: [b]}", "labels: ['b'] is no label"),
    ("name: 12", "name: Input should be a valid string (got 12). Put it in quotes."),
    ("files: {format: csv, header: 1}", "files.header: Input should be a valid boolean (got 1)."),
    ("leaks: {test: ['1']}", "leaks.test.0: Input should be a valid integer (got '1')."),
    ("leaks: {test: [1.0]}", "leaks.test.0: Input should be a valid integer (got '1.0')."),
    ("columns: {text: null}", "(got None)"),
    ("out_of_scope: [a]", "out_of_scope: Input should be a valid string (got ['a'])."),
    ("division: {rule: own, train: -1}", "division.train: Input should be greater than or equal to 0 (got -1)."),
])  # fmt: skip
def test_types_of_a_task_file_are_strict(tmp_path, line, said):
    path = tmp_path / "mine.yaml"
    start = "" if line.startswith("name") else "name: mine\n"
    path.write_text(f"{start}kind: classification\nmetric: accuracy\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(("word", "label"), [
    ("no", "no"), ("on", "on"), ("010", "010"), ("1:30", "1:30"), ("1_000", "1_000"), ("2024-01-31", "2024-01-31"),
    ("1.50", "1.50"), ("1e5", "1e5"), (".inf", ".inf"), ("0x1F", "0x1F"), ("7", "7"), ("-3", "-3"), ("+1", "+1"),
    ("true", "true"), ("'null'", "null"),
])  # fmt: skip
def test_labels_are_what_stands_in_the_file(tmp_path, word, label):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\nkind: classification\nmetric: accuracy\nlabels: [{word}, other]\nout_of_scope: {word}\n"
        "files: {format: csv, header: no}\n",
        encoding="utf-8",
    )
    spec = load_task(path)
    assert (spec.labels, spec.out_of_scope, spec.files.header) == ([label, "other"], label, False)
