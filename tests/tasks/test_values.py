"""Labels, texts, tags and types of a source: exactly as they are written, or refused with file, line and value."""

import json
import math

import datasets
import pandas
import pytest

from sparse_ft.documents import parse_yaml
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import METRICS, TaskSpec, parse_task

TEXTS = [f"text {index}" for index in range(10)]


def task(kind="classification", **changes):
    return TaskSpec.model_validate({"name": "toy", "kind": kind, **changes})


def rows_of(spec, file):
    """Read all rows of one file in their order."""
    parts = [dict(zip(row, values, strict=True)) for part in read(spec, data=file).values()
             for row in [part.column_names] for values in zip(*part.to_dict().values(), strict=True)]  # fmt: skip
    return sorted(parts, key=lambda row: row["row"])


def column(spec, file, name):
    return [row[name] for row in rows_of(spec, file)]


def jsonl(path, **columns):
    """Write rows; strings that begin with ``=`` are JSON as it stands."""
    lines = []
    for values in zip(*columns.values(), strict=True):
        parts = (f'"{name}": {value[1:] if isinstance(value, str) and value[:1] == "=" else json.dumps(value)}'
                 for name, value in zip(columns, values, strict=True))  # fmt: skip
        lines.append("{" + ", ".join(parts) + "}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(("value", "name"), [
    ("=1", "1"), ("=1.10", "1.10"), ("=1.0", "1.0"), ("=1e3", "1e3"),
    ("=123456789012345678901", "123456789012345678901"),
    ("01", "01"), ("NA", "NA"), ("null", "null"), ("true", "true"), ("True", "True"), ("nan", "nan"), (" x ", " x "),
])  # fmt: skip
def test_a_label_is_what_stands_in_the_file(tmp_path, value, name):
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, label=[value, "other"] * 5)
    assert set(column(task(), file, "label")) == {name, "other"}


BAD = [
    ("=NaN", "NaN is no JSON value"),
    ("=-Infinity", "-Infinity is no JSON value"),
    (["pos"], "is the list ['pos']"),
    ({"name": "pos"}, "is the object {'name': 'pos'}"),
    (True, "is the boolean true"),
]


@pytest.mark.parametrize(("value", "said"), [*BAD, (None, "a row of train has no label"), ("", "has no label")])
def test_what_is_no_label_is_refused(tmp_path, value, said):
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, label=["a", "b"] * 4 + [value, value])
    with pytest.raises(DataError) as caught:
        read(task(), data=file)
    assert said in str(caught.value)
    assert "t.jsonl', line " in str(caught.value)


@pytest.mark.parametrize(("value", "said"), [*BAD, (None, "text is null")])
def test_what_is_no_text_is_refused(tmp_path, value, said):
    file = jsonl(tmp_path / "t.jsonl", text=[*TEXTS[:9], value], label=["a", "b"] * 5)
    with pytest.raises(DataError) as caught:
        read(task(), data=file)
    assert said in str(caught.value)
    assert "t.jsonl', line 10" in str(caught.value)


@pytest.mark.parametrize("value", [None, 1.5, True, ["PER"], {"a": 1}, ""])
def test_what_is_no_entity_type_is_refused(tmp_path, value):
    spans = [[{"start": 0, "end": 4, "type": "X"}]] * 9 + [[{"start": 0, "end": 4, "type": value}]]
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, spans=spans)
    spec = task("token_classification", columns={"spans": "spans"})
    if value == 1.5:
        assert label_names(spec, read(spec, data=file)["train"]) == ["1.5", "X"]
    else:
        with pytest.raises(DataError, match=r"t\.jsonl', line 10: the type of a span is "):
            read(spec, data=file)


@pytest.mark.parametrize(("labels", "names"), [
    ("{true: yes, false: no}", ["yes", "no"]),
    ("[true, false]", ["true", "false"]),
    ("[True, False]", ["True", "False"]),
])  # fmt: skip
def test_booleans_are_labels_if_the_task_names_them(tmp_path, labels, names):
    content = parse_yaml(f"name: toy\nkind: classification\nlabels: {labels}", "x", written=True)
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, label=[True, False] * 5)
    assert column(parse_task(content, where="x"), file, "label") == names * 5


@pytest.mark.parametrize(("labels", "said"), [
    ("[null, spam]", "labels: null is no label; a label that is spelled so stands in quotes, as in 'null'"),
    ("[~, spam]", "null is no label"),
    ("[[a], spam]", "['a'] is no label"),
    ("[{a: b}, spam]", "{'a': 'b'} is no label"),
    ("{null: spam, 1: b}", "null is no label"),
    ("{0: null, 1: b}", "null is no label"),
    ("['', spam]", "'' is no label"),
])  # fmt: skip
def test_what_is_no_label_in_a_task_file_is_refused(labels, said):
    content = parse_yaml(f"name: toy\nkind: classification\nlabels: {labels}", "x", written=True)
    with pytest.raises(ConfigError) as caught:
        parse_task(content, where="x")
    assert said in str(caught.value)


def test_labels_of_a_task_file_are_what_stands_in_it():
    labels = "[01, 1, 1.10, 1e3, yes, True, 1:30, 2024-01-01, 0x1f, 'null', .nan]"
    content = parse_yaml(f"name: toy\nkind: classification\nlabels: {labels}", "x", written=True)
    expected = ["01", "1", "1.10", "1e3", "yes", "True", "1:30", "2024-01-01", "0x1f", "null", ".nan"]
    assert parse_task(content, where="x").label_names == expected


# What pandas writes and guesses


def test_a_list_that_pandas_wrote_into_a_cell(tmp_path):
    labels = [["a", "b"], ["a"], [], ["it's", 'say "x"'], ["c|d"]] * 2
    pandas.DataFrame({"text": TEXTS, "labels": labels}).to_csv(tmp_path / "t.csv", index=False)
    assert column(task("multi_label"), tmp_path / "t.csv", "labels") == labels
    with pytest.raises(DataError, match=r"line \d+: label is the list \['"):
        read(task(columns={"label": "labels"}), data=tmp_path / "t.csv")


@pytest.mark.parametrize("cell", ["['a' 'b']", "('a',)", "()", "{'a'}", "set()", "frozenset({'a'})", "array(['a'])"])
def test_a_cell_that_only_looks_like_a_list_is_refused(tmp_path, cell):
    (tmp_path / "t.csv").write_text("text,labels\n" + "".join(f'{text},"{cell}"\n' for text in TEXTS))
    with pytest.raises(DataError, match="look like a list, but are none"):
        read(task("multi_label"), data=tmp_path / "t.csv")


HOT = [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]] * 2
NAMED = [["a", "b"], ["a"], [], ["b", "c"], ["c"]] * 2


def test_zeros_and_ones_are_labels_where_the_task_lists_as_many(tmp_path):
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, labels=HOT)
    assert column(task("multi_label", labels=["a", "b", "c"]), file, "labels") == NAMED
    floats = jsonl(tmp_path / "f.jsonl", text=TEXTS, labels=[[float(one) for one in row] for row in HOT])
    assert column(task("multi_label", labels=["a", "b", "c"]), floats, "labels") == NAMED
    table = tmp_path / "t.csv"
    pandas.DataFrame(HOT, columns=list("abc")).assign(text=TEXTS).to_csv(table, index=False)
    assert column(task("multi_label", columns={"labels": ["a", "b", "c"]}), table, "labels") == NAMED


@pytest.mark.parametrize("labels", [None, ["a", "b"], {"0": "a", "1": "b", "2": "c"}])
def test_other_zeros_and_ones_are_refused(tmp_path, labels):
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, labels=HOT)
    with pytest.raises(DataError, match="labels of every row are 3 zeros and ones"):
        read(task("multi_label", labels=labels), data=file)


def test_ids_of_labels_are_no_zeros_and_ones(tmp_path):
    file = jsonl(tmp_path / "t.jsonl", text=TEXTS, labels=[[0], [1]] * 5)
    assert column(task("multi_label", labels={"0": "a", "1": "b"}), file, "labels") == [["a"], ["b"]] * 5


@pytest.mark.parametrize("quoting", [0, 1, 2])  # minimal, all, all strings
def test_a_tsv_that_pandas_wrote(tmp_path, quoting):
    texts = ['he said "yes"', "two\nlines", "a\ttab", "plain", '"'] * 2
    frame = pandas.DataFrame({"text": texts, "label": ["a", "b"] * 5})
    frame.to_csv(tmp_path / "t.tsv", sep="\t", index=False, quoting=quoting)
    assert column(task(), tmp_path / "t.tsv", "text") == texts


def test_quotes_of_other_tsv_files_mean_nothing(tmp_path):
    for texts in (
        ['"Hello"', '"open', 'he said "yes"', 'a ""b""', '""'] * 2,
        ['"Hello"', "there", "you", "and", "I"] * 2,
    ):
        lines = "".join(f"{text}\t{'ab'[row % 2]}\n" for row, text in enumerate(texts))
        (tmp_path / "t.tsv").write_text("text\tlabel\n" + lines, encoding="utf-8")
        assert column(task(), tmp_path / "t.tsv", "text") == texts


CODES = ["01", "NA", "True", "None", "1.0", "1e3", "null", "nan", "2024-01-01", " x"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_a_folder_in_hub_layout_is_read_without_guesses(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    frame = pandas.DataFrame({"text": CODES, "label": CODES})
    for name in ("train", "test"):
        file = folder / f"{name}.{suffix}"
        if suffix in {"csv", "tsv"}:
            frame.to_csv(file, index=False, sep="," if suffix == "csv" else "\t")
        else:
            frame.to_json(file, orient="records", lines=suffix == "jsonl")
    datasets.load_dataset(str(folder))  # leaves its guesses in the cache
    parts = read(task(), data=folder)
    assert parts["test"]["label"] == parts["test"]["text"] == CODES
    assert len(parts["train"]) + len(parts["validation"]) == 10


def test_missing_values_of_parquet_are_no_labels(tmp_path):
    frame = pandas.DataFrame({"text": TEXTS, "label": [math.nan] * 5 + [0, 1, 0, 1, 2]})
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"row \d: a row of train has no label"):
        read(task(), data=tmp_path / "t.parquet")


# Layouts


def conll(path, *lines):
    path.write_bytes("\n".join(lines).encode())
    return path


SENTENCES = ["Ada B-PER", "sings O", "", "# O", "Bo B-PER", "", "hi O"]


def test_comments_of_conll_are_no_words(tmp_path):
    spec = task("token_classification")
    commented = conll(tmp_path / "c.txt", "# id 1\tdomain=en", *SENTENCES[:3], "# text = # Bo", *SENTENCES[3:])
    plain = conll(tmp_path / "p.txt", *SENTENCES)
    tokens = [["Ada", "sings"], ["#", "Bo"], ["hi"]]
    assert column(spec, commented, "tokens") == column(spec, plain, "tokens") == tokens


def test_carriage_returns_alone_end_lines(tmp_path):
    file = tmp_path / "m.txt"
    file.write_bytes("\r".join(SENTENCES).encode())
    assert column(task("token_classification"), file, "tokens") == [["Ada", "sings"], ["#", "Bo"], ["hi"]]
    table = tmp_path / "m.csv"
    table.write_bytes(b"text,label\ra,x\rb,y\rc,x\r")
    assert column(task(), table, "label") == ["x", "y", "x"]


@pytest.mark.parametrize("labels", [
    {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-ORG", 4: "I-ORG"},
    ["O", "B-PER", "I-PER", "B-ORG", "I-ORG"],
])  # fmt: skip
def test_integer_tags(tmp_path, labels):
    file = jsonl(tmp_path / "t.jsonl", tokens=[["a", "b", text] for text in TEXTS[:6]], ner=[[1, 2, 3]] * 6)
    spec = task("token_classification", labels=labels, columns={"tags": "ner"})
    assert spec.label_names == ["PER", "ORG"]
    again = spec.with_labels(["PER", "ORG"])  # as a checkpoint stores it
    assert column(again, file, "tags") == column(spec, file, "tags") == [["B-PER", "I-PER", "B-ORG"]] * 6
    assert spec.with_labels(["ORG", "PER"]).label_names == ["ORG", "PER"]


def test_integer_tags_without_names_are_refused(tmp_path):
    file = jsonl(tmp_path / "t.jsonl", tokens=[["a", text] for text in TEXTS], tags=[[0, 1]] * 10)
    with pytest.raises(DataError, match=r"line \d+, word 1: the tag is the number 0, which has no name"):
        read(task("token_classification"), data=file)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_under_the_only_key_of_an_object(tmp_path, indent):
    rows = [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(TEXTS)]
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"version": "1", "data": rows}, indent=indent))
    assert column(task(), file, "text") == TEXTS
    file.write_text(json.dumps({"train": rows, "test": rows}, indent=indent))
    with pytest.raises(DataError, match=r"an object with the keys train, test. Choose one: t.json#KEY"):
        read(task(), data=file)
    pandas.DataFrame(rows).to_json(file)
    with pytest.raises(DataError, match=r"holds columns \(text, label\), not rows"):
        read(task(), data=file)


@pytest.mark.parametrize(("header", "said"), [
    ("Text,Label", "Did you mean 'Text'? Then write `columns: {text: Text}`"),
    ("sentence,category", "Did you mean 'sentence'? Then write `columns: {text: sentence}`"),
    ("text;label", "If ';' divides columns, write commas in a .csv file"),
    ("foo,bar", "No column of the first line has this name: 'foo', 'bar'"),
])  # fmt: skip
def test_the_header_is_shown(tmp_path, header, said):
    mark = ";" if ";" in header else ","
    (tmp_path / "t.csv").write_text(header + "\n" + "".join(f"{text}{mark}a\n" for text in TEXTS))
    with pytest.raises(DataError) as caught:
        read(task(), data=tmp_path / "t.csv")
    assert said in str(caught.value)


def test_every_kind_has_a_metric():
    from sparse_ft.tasks.kinds import KINDS

    assert METRICS.keys() == KINDS.keys()
    assert {kind: task(kind).metric for kind in KINDS} == METRICS
    assert task(metric="macro_f1").metric == "macro_f1"
