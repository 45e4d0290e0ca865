"""Data in memory is read as the same rows in a file are."""

import json

import datasets
import numpy as np
import pandas
import pytest

from sparse_ft.errors import ConfigError, DataError
from sparse_ft.tasks.reading import read, rows_seen_in_train
from sparse_ft.tasks.sources import name_sources, scored_split
from sparse_ft.tasks.spec import TaskSpec

TEXTS = [f"text {number}" for number in range(20)]
LABELS = ["new" if number % 2 else "old" for number in range(20)]


def spec_of(kind="classification", metric="accuracy", **changes):
    return TaskSpec.model_validate({"name": "toy", "kind": kind, "metric": metric, **changes})


def columns_of(spec, data, **options):
    return {split: rows.to_dict() for split, rows in read(spec, data=data, **options).items()}


def in_a_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def forms(rows):
    """Give the same rows in each form that has column names."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return [datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).with_format("numpy"),
            pandas.DataFrame(columns)]  # fmt: skip


@pytest.mark.parametrize("columns", [{}, {"text": "sentence", "label": "class"}])
def test_rows_without_splits_are_divided_as_those_of_a_file(tmp_path, columns):
    spec = spec_of(columns=columns)
    names = {"text": "text", "label": "label", **columns}
    rows = [{names["text"]: text, names["label"]: label} for text, label in zip(TEXTS, LABELS, strict=True)]
    expected = columns_of(spec, in_a_file(tmp_path, rows))
    assert {split: len(part["row"]) for split, part in expected.items()} == {"train": 16, "validation": 2, "test": 2}
    for data in [*forms(rows), (TEXTS, LABELS), (np.array(TEXTS), pandas.Series(LABELS))]:
        assert columns_of(spec, data) == expected
        assert columns_of(spec, data, splits=["test"]) == {"test": expected["test"]}
        assert scored_split(spec, data) == "test"
        assert rows_seen_in_train(spec, "test", data=data) == set()


def test_labels_of_numpy_and_pandas_have_the_names_that_a_file_gives_them(tmp_path):
    spec = spec_of(labels={"0": "no", "1": "yes", "true": "yes"})
    plain = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
    expected = columns_of(spec, in_a_file(tmp_path, plain))
    frame = pandas.DataFrame(plain)
    numbers = [row["label"] for row in plain]
    for data in [frame, frame.astype({"label": "float"}), frame.astype({"label": "category"}),
                 (TEXTS, np.array(numbers)), (TEXTS, numbers)]:  # fmt: skip
        assert columns_of(spec, data) == expected
    truths = (TEXTS[:3], np.array([True, True, True]))
    assert columns_of(spec, truths)["test"]["label"] == ["yes"]


def test_class_names_of_a_dataset_are_its_labels():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 10}, features=features)
    assert set(columns_of(spec_of(), data)["train"]["label"]) == {"a", "b"}


def test_a_dataset_dict_keeps_its_splits(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    for name, part in {"train": rows[:10], "dev": rows[10:15], "test": rows[15:]}.items():
        in_a_file(tmp_path, part).rename(tmp_path / f"{name}.jsonl")
    files = {"format": "jsonl", "train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
    parts = {"train": rows[:10], "validation": rows[10:15], "test": rows[15:]}
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in parts.items()})
    assert columns_of(spec_of(), data) == columns_of(spec_of(files=files), tmp_path)
    del data["validation"], data["test"], files["validation"], files["test"]
    cut = columns_of(spec_of(), data)
    assert cut == columns_of(spec_of(files=files), tmp_path)
    assert set(cut) == {"train", "validation"}
    assert scored_split(spec_of(), data) == "validation"


def test_tags_and_spans(tmp_path):
    tagging = spec_of("token_classification", "f1")
    tokens, tags = [["Ada", f"ran{number}"] for number in range(10)], [["B-PER", "O"]] * 10
    rows = [{"tokens": words, "tags": row} for words, row in zip(tokens, tags, strict=True)]
    expected = columns_of(tagging, in_a_file(tmp_path, rows))
    for data in [*forms(rows), (tokens, tags), (tokens, [np.array(row) for row in tags])]:
        assert columns_of(tagging, data) == expected
        with_spans = spec_of("token_classification", "f1", columns={"text": "text", "spans": "spans"})
        assert columns_of(with_spans, data) == expected
    texts, spans = [f"Ada ran{number}" for number in range(10)], [[{"start": 0, "end": 3, "type": "PER"}], []] * 5
    rows = [{"text": text, "spans": row} for text, row in zip(texts, spans, strict=True)]
    for data in [*forms(rows), (texts, spans)]:
        assert columns_of(tagging, data) == columns_of(tagging, in_a_file(tmp_path, rows))


def test_the_other_kinds(tmp_path):
    rows = [{"text": text, "labels": ["a", "b"][: number % 3]} for number, text in enumerate(TEXTS)]
    spec = spec_of("multi_label", "micro_f1")
    for data in [*forms(rows), (TEXTS, [row["labels"] for row in rows])]:
        assert columns_of(spec, data) == columns_of(spec, in_a_file(tmp_path, rows))
    rows = [{"text": text, "choices": ["x", "y"], "answer": number % 2} for number, text in enumerate(TEXTS)]
    spec = spec_of("multiple_choice")
    for data in forms(rows):
        assert columns_of(spec, data) == columns_of(spec, in_a_file(tmp_path, rows))
    answers = [[{"text": "text", "answer_start": 0}]] * len(TEXTS)
    rows = [{"text": text, "text_pair": "?", "answers": row} for text, row in zip(TEXTS, answers, strict=True)]
    spec = spec_of("span_extraction", "answer_f1")
    for data in forms(rows):
        assert columns_of(spec, data) == columns_of(spec, in_a_file(tmp_path, rows))


PAIRS = {"kind": "classification", "columns": {"text_pair": "second"}}


@pytest.mark.parametrize(
    ("changes", "data", "said"),
    [
        ({}, (TEXTS, LABELS[:3]), "has 20 texts and 3 labels"),
        ({}, (TEXTS, LABELS, LABELS), "is a tuple of 3 parts. Expected (texts, labels)"),
        ({}, [TEXTS, LABELS], "is a list. Expected a path, a datasets.Dataset or DatasetDict"),
        ({}, ("one text", LABELS), "must be lists, not str: 'one text'"),
        ({}, ([], []), "'toy' in memory has no rows"),
        ({}, (TEXTS[:2], LABELS[:2]), "has 2 rows, too few"),
        ({}, ([*TEXTS[:3], None], LABELS[:4]), "text is null"),
        ({}, (TEXTS[:3], ["a", np.nan, "a"]), "row of train has no label"),
        ({"labels": ["old"]}, (TEXTS, LABELS), "Unknown label 'new'"),
        (PAIRS, (TEXTS, LABELS), "the columns text, text_pair, label. Expected a Dataset or a DataFrame"),
        ({}, pandas.DataFrame({"text": TEXTS, "lable": LABELS}), "No column 'label' in 'DataFrame in memory', row"),
        ({}, pandas.DataFrame({"text": [], "label": []}), "has no rows"),
        ({}, datasets.DatasetDict(dev=datasets.Dataset.from_dict({"text": ["a"]})), "a split 'dev'. Expected train,"),
        ({}, datasets.DatasetDict(), "has no rows in any split"),
        ({}, datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": []})), "has no rows in test"),
        ({"kind": "token_classification"}, ([["a", "b"], ["c", "d"], ["e", "f"]], [["O"]] * 3), "2 tokens but 1 tags"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_words(changes, data, said):
    with pytest.raises(DataError) as caught:
        read(spec_of(**changes), data=data)
    assert said in str(caught.value)


def test_data_in_memory_belongs_to_the_one_task_or_to_the_task_named():
    pair, split = (TEXTS, LABELS), datasets.DatasetDict()
    assert name_sources(pair, ["toy"]) == {"toy": pair}
    assert name_sources(split, ["toy"]) == {"toy": split}
    assert name_sources({"toy": pair, "other": "/data"}, ["toy", "other"]) == {"toy": pair, "other": "/data"}
    with pytest.raises(ConfigError, match=r"data in memory \(tuple\) names no task, but there are 2: toy, other"):
        name_sources(pair, ["toy", "other"])
