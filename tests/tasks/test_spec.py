import re

import pytest

from sparse_ft.errors import ConfigError
from sparse_ft.resources import bundled_dir
from sparse_ft.tasks.schemes import SCHEMES
from sparse_ft.tasks.spec import list_tasks, load_task, parse_task

PUBLIC = [
    *("ag_news", "atis", "atis_slots", "banking77", "clinc150", "conll2003", "sst2"),
    *("chnsenticorp", "cic", "msra_ner", "resume_ner"),
    *(
        "clue/afqmc",
        "clue/c3",
        "clue/chid",
        "clue/cluener",
        "clue/cluewsc",
        "clue/cmnli",
        "clue/cmrc2018",
        "clue/csl",
        "clue/drcd",
        "clue/iflytek",
        "clue/ocnli",
        "clue/tnews",
    ),
]
SAMPLES = ["sentiment", "topic", "intent", "ner"]


def test_all_tasks_are_listed():
    assert set(PUBLIC + SAMPLES) <= set(list_tasks())


@pytest.mark.parametrize("name", PUBLIC + SAMPLES)
def test_bundled_task_is_complete(name):
    spec = load_task(name)
    assert spec.name == name.rpartition("/")[2]  # a task is called so in a checkpoint, where names have no folders
    metrics = {"classification": "accuracy", "token_classification": "f1"}
    metrics |= {"span_extraction": "exact_match", "multiple_choice": "accuracy"}
    assert spec.metric == metrics[spec.kind]
    assert spec.label_scheme in SCHEMES
    assert spec.language in {"en", "zh"}
    assert spec.description
    assert spec.example
    assert spec.license
    assert spec.source
    assert spec.files is not None
    assert spec.files.train
    assert spec.files.test
    assert set(spec.files.unlabelled) <= {"test"}
    if spec.label_names is not None:
        assert len(set(spec.label_names)) == len(spec.label_names)
    if isinstance(spec.labels, dict):
        assert len(set(spec.labels.values())) == len(spec.labels)
    for rows in spec.leaks.values():
        assert rows == sorted(set(rows))


@pytest.mark.parametrize("name", PUBLIC + SAMPLES)
def test_task_file_begins_with_a_comment_and_has_no_long_lines(name):
    lines = (bundled_dir("tasks") / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
    assert lines[0].startswith("# ")
    assert max(len(line) for line in lines) <= 140
    assert not [line for line in lines if re.search(r"(?<!https:)(?<!http:)(/work|/home|/tmp|/root)\b", line)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_tasks_hold_no_data(name):
    assert load_task(name).files.root is None


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_have_an_absolute_root(name):
    spec = load_task(name)
    assert spec.files.root == str((bundled_dir("tasks") / "data" / name).resolve())
    assert spec.hub is None
    assert spec.license == "CC0-1.0"


def test_unknown_task_is_suggested():
    with pytest.raises(ConfigError, match=r"Unknown task 'conll2030'. Did you mean 'conll2003'?"):
        load_task("conll2030")


def test_missing_task_file(tmp_path):
    with pytest.raises(ConfigError, match=r"my\.yaml' does not exist"):
        load_task(tmp_path / "my.yaml")


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


@pytest.mark.parametrize("content", ["a: [", "\xff"])
def test_unreadable_task_file(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_task(path)


def test_all_problems_are_told_at_once():
    values = {"name": "mine", "kind": "classification", "metrik": "accuracy", "files": {"format": "docx", "trian": "a"}}
    with pytest.raises(ConfigError) as caught:
        parse_task(values, where="mine.yaml")
    text = str(caught.value)
    assert "\n" not in text
    suggested = ("Did you mean 'metric'?", "Did you mean 'files.train'?")
    for said in ("'mine.yaml'", "files.format", "'docx'", "metric: Field", *suggested):
        assert said in text


@pytest.mark.parametrize("values", [None, [], "text"])
def test_a_task_is_a_mapping(values):
    with pytest.raises(ConfigError, match=r"'mine\.yaml' must hold a mapping"):
        parse_task(values, where="mine.yaml")


def test_label_names_keep_their_order():
    base = {"name": "mine", "kind": "classification", "metric": "accuracy"}
    assert parse_task({**base, "labels": ["b", 1, True]}, where="x").label_names == ["b", "1", "true"]
    assert parse_task({**base, "labels": {1: "b", 2: "a", 3: "b"}}, where="x").label_names == ["b", "a"]
    assert parse_task(base, where="x").label_names is None
