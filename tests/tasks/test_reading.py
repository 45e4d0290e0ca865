"""Readers on small files written here; the published data sets are in test_public_data.py."""

import gzip
import json
import logging
import re
from pathlib import Path

import datasets
import pytest
import torch

from sparse_ft.errors import ConfigError, DataError
from sparse_ft.tasks.formats import FORMATS
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import label_names, read, rows_seen_in_train
from sparse_ft.tasks.schemes import Span, spans_from_tags
from sparse_ft.tasks.spec import TaskSpec

CSV = {"format": "csv", "train": "train.csv", "validation": "dev.csv", "test": "test.csv"}
CONLL = {"format": "conll", "train": "train.txt", "validation": "dev.txt", "test": "test.txt"}


def classification(**changes):
    values = {"name": "toy", "kind": "classification", "metric": "accuracy", "files": CSV, **changes}
    return TaskSpec.model_validate(values)


def tagging(**changes):
    values = {"name": "toy", "kind": "token_classification", "metric": "f1", "files": CONLL, **changes}
    return TaskSpec.model_validate({"columns": {"tokens": 0, "tags": -1}, **values})


def write(folder: Path, **files: str) -> Path:
    """Write files; a double underscore in a name stands for the dot."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def one(spec, folder, split="test"):
    return read(spec, data=folder, splits=[split])[split]


def message(spec, data, split="test") -> str:
    with pytest.raises(DataError) as caught:
        read(spec, data=data, splits=[split])
    text = str(caught.value)
    assert "\n" not in text
    return text


# What one file of a split becomes


def jsonl(kind, columns=None, **changes):
    """A task of one JSONL file, t.jsonl."""
    make = tagging if kind == "tagging" else classification
    changes = changes if kind in ("tagging", "classification") else {"kind": kind, **changes}
    return make(columns=columns or {}, files={"format": "jsonl", "test": "t.jsonl"}, **changes)


NO_HEADER = {**CSV, "header": False}
LINES = {"format": "lines", "test": "."}
SLOTS = tagging(files=LINES, columns={"tokens": "seq.in", "tags": "seq.out"})
TSV = classification(files={"format": "tsv", "test": "test.tsv"})
CLUENER = tagging(columns={}, language="zh", files={"format": "cluener", "test": "t.json", "unlabelled": ["test"]})
CLUEWSC = classification(files={"format": "cluewsc", "test": "t.json"})
XY = {"tags": [["B-X", "B-X", "I-X", "O"]]}


def wsc(*places):
    """A row of CLUEWSC whose first and second span are (text, index)."""
    named = {f"span{n}_{key}": value for n, place in enumerate(places, 1)
             for key, value in zip(("text", "index"), place, strict=True)}  # fmt: skip
    return json.dumps({"text": "小王走了，他累", "label": "true", "target": named})


READS = [
    # task, files, columns of the outcome
    (classification(), {"test.csv": 'text,label\r\n"a, ""b""\nc",x\r\nd,y\r\n'},
     {"text": ['a, "b"\nc', "d"], "label": ["x", "y"], "row": [0, 1]}),
    (TSV, {"test.tsv": 'text\tlabel\n"open\tx\nsays "hi"\ty\n'}, {"text": ['"open', 'says "hi"']}),  # knows no quotes
    (classification(files=NO_HEADER, columns={"text": "1..", "label": 0}), {"test.csv": "1,title,body\n2,t,b\n"},
     {"text": ["title body", "t b"], "label": ["1", "2"]}),
    (classification(files=NO_HEADER, columns={"text": "1..", "label": 0}), {"test.csv": "1,both\n"},
     {"text": ["both"]}),
    (classification(files=NO_HEADER, columns={"text": [2, 1], "label": -3}), {"test.csv": "1,title,body\n2,t,b\n"},
     {"text": ["body title", "b t"], "label": ["1", "2"]}),
    (classification(), {"test.csv.gz": gzip.compress(b"text,label\na,x\n")}, {"text": ["a"]}),
    (classification(), {"test.csv": b"\xef\xbb\xbftext,label\na,x\n"}, {"text": ["a"]}),  # a byte order mark
    (classification(columns={"text": "q1", "text_pair": "q2"}), {"test.csv": "q1,q2,label\na,b,x\n"},
     {"text": ["a"], "text_pair": ["b"], "label": ["x"], "row": [0]}),
    (classification(labels={"0": "bad", "1": "good"}), {"test.csv": "text,label\na,0\nb,good\nc,7\n"},
     {"label": ["bad", "good", "7"]}),
    (classification(labels=["x", "y"]), {"test.csv": "text,label\na,x\nb,\nc,unknown\n"}, {"label": ["x", None,
     "unknown"]}),
    (classification(files={**CSV, "unlabelled": ["test"]}), {"test.csv": "text\na\n"}, {"label": [None]}),
    (jsonl("classification"),
     {"t.jsonl": '{"text": "a\u2028b\u0085c", "label": 1}\r\n\n{"text": 1.10, "label": 1.0}\n'},
     {"text": ["a\u2028b\u0085c", "1.10"], "label": ["1", "1.0"], "row": [0, 1]}),
    (jsonl("classification", {"text": ["a", "b"], "label": "c"}), {"t.jsonl": '{"a": "x", "b": null, "c": 1}\n'},
     {"text": ["x"]}),
    (tagging(),
     {"test.txt": "-DOCSTART- -X- O\n\nAda NN B-PER\nsings VB O\n\n\nBo  NN\tB-PER\r\n\r\n-DOCSTART- O O\nx X O"},
     {"tokens": [["Ada", "sings"], ["Bo"], ["x"]], "tags": [["B-PER", "O"], ["B-PER"], ["O"]], "row": [0, 1, 2]}),
    (tagging(label_scheme="iob1"), {"test.txt": "a I-X\nb B-X\nc I-X\nd O\n"}, XY),
    (tagging(label_scheme="iob2"), {"test.txt": "a B-X\nb B-X\nc I-X\nd O\n"}, XY),
    (tagging(label_scheme="bioes"), {"test.txt": "a S-X\nb B-X\nc E-X\nd O\n"}, XY),
    (tagging(label_scheme="BILOU"), {"test.txt": "a U-X\nb B-X\nc L-X\nd O\n"}, XY),
    (tagging(label_scheme="bios"), {"test.txt": "a S-X\nb B-X\nc I-X\nd O\n"}, XY),
    (tagging(label_scheme="bmes"), {"test.txt": "a S-X\nb B-X\nc E-X\nd O\n"}, XY),
    (tagging(files={**CONLL, "unlabelled": ["test"]}), {"test.txt": "a\nb\n"}, {"tokens": [["a", "b"]], "tags": [None],
     "row": [0]}),
    (SLOTS, {"seq.in": "to rome\nhi\n", "seq.out": "O B-city\nO\n"},
     {"tokens": [["to", "rome"], ["hi"]], "tags": [["O", "B-city"], ["O"]], "row": [0, 1]}),
    (classification(files=LINES, columns={"text": "seq.in"}), {"seq.in": "a b\nc\n", "label": "go\ngreet\n"},
     {"text": ["a b", "c"], "label": ["go", "greet"]}),
    (CLUENER, {"t.json": '{"text": "去罗马玩", "label": {"city": {"罗马": [[1, 2]]}}}\n{"text": "好"}'},
     {"tags": [["O", "B-city", "I-city", "O"], None]}),  # both offsets count
    (CLUEWSC, {"t.json": wsc(("小王", 0), ("他", 5)) + "\n" + wsc(("他", 5), ("小王", 0))},
     {"text": ["_小王_走了，[他]累", "[小王]走了，_他_累"]}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "files", "expected"), READS)
def test_a_file_becomes_rows(tmp_path, spec, files, expected):
    columns = one(spec, write(tmp_path, **files)).to_dict()
    assert {name: columns[name] for name in expected} == expected


# JSON


def test_json_key_selects_a_list_of_lists(tmp_path):
    files = {"format": "json", "train": ["d.json#train", "d.json#extra"], "test": "d.json#nothing"}
    spec = classification(files=files, columns={"text": 0, "label": 1})
    content = {"train": [[f"t{index}", "a"] for index in range(9)], "extra": [["o", "oos"]]}
    write(tmp_path, d__json=json.dumps(content))
    both = read(spec, data=tmp_path, splits=["train", "validation"])
    assert sorted([*both["train"]["row"], *both["validation"]["row"]]) == list(range(10))
    assert "has no key 'nothing'. Its keys: train, extra" in message(spec, tmp_path)
    assert "Choose one: d.json#KEY" in message(spec, tmp_path / "d.json")


def test_rows_with_the_same_text_are_on_one_side(tmp_path):
    rows = "".join(f"Text {index // 5},{index % 2}\n" for index in range(200))
    write(tmp_path, all__csv=f"text,label\n{rows}")
    splits = read(classification(), data=tmp_path / "all.csv")
    texts = [set(splits[split]["text"]) for split in ("train", "validation", "test")]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 40
    assert {split: len(splits[split]) for split in splits} == {"train": 160, "validation": 20, "test": 20}


def test_a_table_of_positions_may_have_a_header(tmp_path):
    spec = classification(columns={"text": 0, "label": 1}, files={"format": "csv", "header": True, "train": "x.csv"})
    write(tmp_path, z__csv="review,stars\n" + "".join(f"t{index},{index % 2}\n" for index in range(10)))
    assert set(read(spec, data=tmp_path / "z.csv")["train"]["label"]) == {"0", "1"}


# Labels


def test_sentences_of_the_same_words_stay_together(tmp_path):
    sentences = [f"w{index % 10} O\nend O\n" for index in range(60)]
    write(tmp_path, mine__conll="\n".join(sentences))
    parts = single(tagging(), tmp_path / "mine.conll")
    words = {split: {row[0] for row in part["tokens"]} for split, part in parts.items()}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["validation"]


def test_dropped_labels_keep_the_row_numbers(tmp_path):
    write(tmp_path, test__csv="text,label\na,-\nb,x\n")
    spec = classification(drop_labels=["-"], leaks={"test": [1]})
    assert one(spec, tmp_path).to_dict() == {"text": ["b"], "label": ["x"], "row": [1]}
    assert rows_seen_in_train(spec, "test", data=tmp_path) == {1}
    assert rows_seen_in_train(spec, "test", data=tmp_path / "test.csv") == set()
    assert rows_seen_in_train(spec, "test") == set()


def test_label_names_of_the_task_come_first(tmp_path):
    write(tmp_path, train__csv="text,label\na,z\nb,y\n")
    train = one(classification(), tmp_path, "train")
    assert label_names(classification(), train) == ["y", "z"]
    assert label_names(classification(labels=["z", "y", "x"]), train) == ["z", "y", "x"]


def test_multi_label(tmp_path):
    spec = classification(kind="multi_label", labels={"s": "sport", "n": "news"})
    write(tmp_path, train__csv="text,labels\na,s|n\nb,\nc, news \n", test__csv="text,labels\na,q\n")
    train = one(spec, tmp_path, "train")
    assert train["labels"] == [["sport", "news"], [], ["news"]]
    assert label_names(spec, train) == ["sport", "news"]
    assert label_names(spec.model_copy(update={"labels": None}), train) == ["news", "sport"]
    assert one(spec, tmp_path)["labels"] == [["q"]]
    listed = spec.model_copy(update={"files": spec.files.model_copy(update={"format": "jsonl", "test": "t.jsonl"})})
    write(tmp_path, t__jsonl='{"text": "a", "labels": ["s"]}\n{"text": "b", "labels": null}\n')
    assert one(listed, tmp_path)["labels"] == [["sport"], None]


def test_entity_types_are_mapped_and_checked(tmp_path):
    write(tmp_path, train__txt="a B-NAME\nb I-NAME\n", test__txt="a B-CITY\n")
    spec = tagging(labels={"NAME": "PER"})
    train = one(spec, tmp_path, "train")
    assert train["tags"] == [["B-PER", "I-PER"]]
    assert label_names(spec, train) == ["PER"]
    assert label_names(spec.model_copy(update={"labels": None}), train) == ["PER"]
    assert one(spec, tmp_path)["tags"] == [["B-CITY"]]


# Character spans


def spans_task(**changes):
    return tagging(columns={"text": "text", "spans": "spans"}, files={"format": "jsonl", "test": "t.jsonl"}, **changes)


def test_spans_cut_words_and_survive(tmp_path):
    row = {
        "text": "Ask Müller-Meier, 3x.",
        "spans": [{"start": 4, "end": 10, "type": "PER"}, {"start": 18, "end": 19, "type": "NUM"}],
    }
    write(tmp_path, t__jsonl=json.dumps(row))
    read_row = one(spans_task(), tmp_path)[0]
    assert read_row["text"] == row["text"]
    for token, start, end in zip(read_row["tokens"], read_row["starts"], read_row["ends"], strict=True):
        assert row["text"][start:end] == token
    offsets = [
        (read_row["starts"][span.start], read_row["ends"][span.end - 1], span.type)
        for span in spans_from_tags(read_row["tags"])
    ]
    assert offsets == [(4, 10, "PER"), (18, 19, "NUM")]


def test_longer_span_wins_and_the_loss_is_told(tmp_path, caplog):
    row = {
        "text": "Bank of Rome",
        "spans": [{"start": 8, "end": 12, "type": "LOC"}, {"start": 0, "end": 12, "type": "ORG"}],
    }
    write(tmp_path, t__jsonl=json.dumps(row))
    with caplog.at_level(logging.WARNING, logger="sparse_ft"):
        assert one(spans_task(), tmp_path)["tags"] == [["B-ORG", "I-ORG", "I-ORG"]]
    assert "1 spans overlap" in caplog.text


def test_where_a_model_is_scored_words_do_not_end_where_the_gold_does(tmp_path):
    row = {"text": "Berlin-based firm", "spans": [{"start": 0, "end": 6, "type": "LOC"}]}
    write(tmp_path, train__jsonl=json.dumps(row), t__jsonl=json.dumps(row))
    files = {"format": "jsonl", "train": "train.jsonl", "test": "t.jsonl", "validation": "t.jsonl"}
    spec = tagging(columns={"text": "text", "spans": "spans"}, files=files, labels=["LOC"])
    splits = read(spec, data=tmp_path)
    kind, labels = find_kind(spec.kind), ["LOC"]
    train, test = splits["train"].to_dict(), splits["test"].to_dict()
    assert "parents" not in train
    assert train["tokens"] == test["tokens"] == [["Berlin", "-based", "firm"]]
    assert test["parents"] == [[0, 0, 1]]
    assert kind.num_parts(train, language="en") == [3]
    assert kind.num_parts(test, language="en") == [2]
    assert test[kind.answer_column] == [["B-LOC", "O", "O"]]
    logits = [torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])]  # O, B-LOC, I-LOC of two words
    predicted = kind.predictions(logits, columns=test, labels=labels)
    assert predicted == [["B-LOC", "I-LOC", "O"]]  # all of Berlin-based, which is not the gold
    score = kind.score(test[kind.answer_column], predicted, labels=labels, out_of_scope=None)
    assert score.metrics["f1"] == 0
    types = ["JOB-TITLE"]  # a type may look as if a tag began in it
    predicted = kind.predictions(logits, columns=test, labels=types)
    assert predicted == [["B-JOB-TITLE", "I-JOB-TITLE", "O"]]
    inside = [torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])]
    assert kind.predictions(inside, columns={"parents": [[0, 1, 1]]}, labels=types) == [
        ["B-JOB-TITLE", "I-JOB-TITLE", "I-JOB-TITLE"]
    ]


# Splits


def test_validation_is_a_fixed_tenth_of_train(tmp_path):
    spec = classification(files={"format": "csv", "train": "train.csv"})
    write(tmp_path, train__csv="text,label\n" + "".join(f"t{index},{index % 2}\n" for index in range(50)))
    both = read(spec, data=tmp_path)
    assert set(both) == {"train", "validation"}
    train, validation = both["train"]["row"], both["validation"]["row"]
    assert (len(train), len(validation)) == (45, 5)
    assert sorted([*train, *validation]) == list(range(50))
    assert train == sorted(train)
    assert one(spec, tmp_path, "train")["row"] == train
    assert one(spec, tmp_path, "validation")["row"] == validation
    assert read(spec, data=tmp_path, splits=["test"]) == {}


def test_rows_of_several_files_are_counted_on(tmp_path):
    spec = classification(files={"format": "csv", "test": ["a.csv", "b.csv"]})
    write(tmp_path, a__csv="text,label\na,x\nb,x\n", b__csv="text,label\nc,oos\n")
    assert one(spec, tmp_path).to_dict() == {"text": ["a", "b", "c"], "label": ["x", "x", "oos"], "row": [0, 1, 2]}


def test_bundled_root_is_used_without_data(tmp_path):
    write(tmp_path, test__csv="text,label\na,x\n")
    spec = classification(files={**CSV, "root": str(tmp_path)}, leaks={"test": [0]})
    assert read(spec, splits=["test"])["test"]["text"] == ["a"]
    assert rows_seen_in_train(spec, "test") == {0}
    gone = classification(files={**CSV, "root": str(tmp_path / "gone")})
    with pytest.raises(DataError, match=r"gone/test\.csv' does not exist"):
        read(gone, splits=["test"])


# One file


def single(spec, path):
    return {split: dataset.to_dict() for split, dataset in read(spec, data=path).items()}


def all_rows(parts, column):
    rows = [pair for part in parts.values() for pair in zip(part["row"], part[column], strict=True)]
    return [value for _, value in sorted(rows)]


def test_one_file_is_divided_alike_every_time(tmp_path):
    write(tmp_path, mine__csv="text,label\n" + "".join(f"t{index},{index % 2}\n" for index in range(30)))
    parts = single(classification(), tmp_path / "mine.csv")
    assert {split: len(part["row"]) for split, part in parts.items()} == {"train": 24, "validation": 3, "test": 3}
    assert all_rows(parts, "text") == [f"t{index}" for index in range(30)]
    assert single(classification(), tmp_path / "mine.csv") == parts
    assert one(classification(), tmp_path / "mine.csv").to_dict() == parts["test"]


def test_few_texts_are_divided_by_rows_so_that_no_class_is_lost(tmp_path, caplog):
    lines = [f"{text},{text}" for text in ("yes", "no", "stop")] * 20
    write(tmp_path, mine__csv="text,label\n" + "\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING, logger="sparse_ft"):
        parts = single(classification(), tmp_path / "mine.csv")
    assert "has only 3 different texts in 60 rows" in caplog.text
    assert set(parts["train"]["label"]) == {"yes", "no", "stop"}
    assert {split: len(part["row"]) for split, part in parts.items()} == {"train": 48, "validation": 6, "test": 6}


@pytest.mark.parametrize(("name", "content"), [
    ("m.csv", "label,text\nx,a\ny,b\nx,c\n"),
    ("m.tsv", "sentence\tlabel\na\tx\nb\ty\nc\tx\n"),
    ("m.txt", "text\tlabel\na\tx\nb\ty\nc\tx\n"),
    ("m.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n{"text": "c", "label": "x"}\n'),
    ("m.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "x"}]'),
])  # fmt: skip
@pytest.mark.parametrize("files", [None, {"format": "csv", "header": False}])
def test_one_file_of_another_format_for_classification(tmp_path, name, content, files):
    (tmp_path / name).write_text(content, encoding="utf-8")
    parts = single(classification(files=files, columns={"text": "sentence", "label": "label"}), tmp_path / name)
    assert all_rows(parts, "text") == ["a", "b", "c"]
    assert all_rows(parts, "label") == ["x", "y", "x"]


def test_positions_of_the_task_give_way_to_a_header_with_our_names(tmp_path):
    spec = classification(files={"format": "csv", "header": False}, columns={"text": "1..", "label": 0})
    write(tmp_path, with__csv="text,label\na,x\nb,y\nc,x\n", without__csv="x,a\ny,b\nx,c\n")
    assert all_rows(single(spec, tmp_path / "with.csv"), "text") == ["a", "b", "c"]
    assert all_rows(single(spec, tmp_path / "without.csv"), "text") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.txt", "Ada B-PER\nran O\n\nBo B-PER\n\nhi O\n"),
        ("m.conll", "Ada NN B-PER\nran VB O\n\nBo NN B-PER\n\nhi X O\n"),
        ("m.tsv", "Ada\tB-PER\nran\tO\n\nBo\tB-PER\n\nhi\tO\n"),
        ("m.tsv", "tokens\ttags\nAda ran\tB-PER O\nBo\tB-PER\nhi\tO\n"),
        ("m.csv", "tokens,tags\nAda ran,B-PER O\nBo,B-PER\nhi,O\n"),
        (
            "m.jsonl",
            '{"tokens": ["Ada", "ran"], "tags": ["B-PER", "O"]}\n{"tokens": ["Bo"], "tags": ["B-PER"]}\n'
            '{"tokens": ["hi"], "tags": ["O"]}\n',
        ),
        (
            "m.jsonl",
            '{"text": "Ada ran", "spans": [{"start": 0, "end": 3, "type": "PER"}]}\n'
            '{"text": "Bo", "spans": [{"start": 0, "end": 2, "type": "PER"}]}\n{"text": "hi", "spans": []}\n',
        ),
    ],
)
def test_one_file_of_another_format_for_tagging(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    tags = -1 if name == "m.conll" else 1
    spec = tagging(files={**CONLL, "separator": " "}, columns={"tokens": 0, "tags": tags})
    parts = single(spec, tmp_path / name)
    assert all_rows(parts, "tokens") == [["Ada", "ran"], ["Bo"], ["hi"]]
    assert all_rows(parts, "tags") == [["B-PER", "O"], ["B-PER"], ["O"]]


def test_one_file_with_the_publishers_suffix_has_the_tasks_format(tmp_path):
    (tmp_path / "eng.testa").write_text("a O\n\nb B-X\n\nc O\n", encoding="utf-8")
    assert all_rows(single(tagging(), tmp_path / "eng.testa"), "tokens") == [["a"], ["b"], ["c"]]


# Parquet and hub layout


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_hub(folder: Path, features: datasets.Features, **splits: dict) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, columns in splits.items():
        dataset = datasets.Dataset.from_dict(columns, features=features)
        dataset.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


REVIEWS = datasets.Features({"sentence": datasets.Value("string"), "y": datasets.ClassLabel(names=["good", "bad"])})


def test_hub_classification(tmp_path, hub_cache):
    rows = {"sentence": [f"s{index}" for index in range(20)], "y": [index % 2 for index in range(20)]}
    folder = write_hub(tmp_path / "hub", REVIEWS, train=rows, test={"sentence": ["t"], "y": [-1]})
    hub = {
        "path": str(folder),
        "columns": {"text": "sentence", "label": "y"},
        "labels": {"good": "positive", "bad": "negative"},
    }
    columns = {"text": "y"}  # of the files; here another column bears that name, so it must not be looked at
    spec = classification(hub=hub, labels=["negative", "positive"], columns=columns)
    parts = read(spec)
    assert set(parts["train"]["label"]) == {"negative", "positive"}
    assert {split: len(part) for split, part in parts.items()} == {"train": 18, "validation": 2, "test": 1}
    assert parts["test"][0] == {"text": "t", "label": None, "row": 0}
    for row in parts["train"]:
        assert row["label"] == ("positive" if row["row"] % 2 == 0 else "negative")


def test_hub_split_names(tmp_path, hub_cache):
    folder = write_hub(
        tmp_path / "hub", REVIEWS, train={"sentence": ["a", "b"], "y": [0, 1]}, test={"sentence": ["t"], "y": [1]}
    )
    hub = {"path": str(folder), "columns": {"text": "sentence", "label": "y"}, "splits": {"validation": "test"}}
    parts = read(classification(hub=hub), splits=["validation", "train"])
    assert parts["validation"]["label"] == ["bad"]
    assert len(parts["train"]) == 2
    none = classification(hub={**hub, "splits": {"test": "nothing"}})
    with pytest.raises(DataError, match=r"has the splits train, test, not test"):
        read(none, splits=["test"])


@pytest.mark.parametrize("names", [["O", "B-PER", "I-PER", "B-LOC"], ["B-LOC", "I-PER", "O", "B-PER"]])
def test_hub_tags_are_names_whatever_their_order(tmp_path, hub_cache, names):
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner": datasets.List(datasets.ClassLabel(names=names))}
    )
    tags = ["B-PER", "I-PER", "O", "B-LOC"]
    rows = {"tokens": [list("abcd")], "ner": [[names.index(tag) for tag in tags]]}
    folder = write_hub(tmp_path / "hub", features, test=rows, validation={"tokens": [["a"]], "ner": [[-1]]})
    parts = read(tagging(hub={"path": str(folder), "columns": {"tags": "ner"}}), splits=["validation", "test"])
    assert parts["test"]["tags"] == [tags]
    assert parts["validation"]["tags"] == [None]
    assert spans_from_tags(parts["test"]["tags"][0]) == [Span("PER", 0, 2), Span("LOC", 3, 4)]


def test_hub_tags_without_names_are_mapped(tmp_path, hub_cache):
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.Value("int64"))}
    )
    folder = write_hub(tmp_path / "hub", features, test={"tokens": [["a", "b"]], "tags": [[1, 0]]})
    hub = {"path": str(folder), "columns": {}, "labels": {"0": "O", "1": "S-PER"}, "label_scheme": "bioes"}
    assert read(tagging(hub=hub), splits=["test"])["test"]["tags"] == [["B-PER", "O"]]


def test_folder_in_hub_layout_for_a_task_without_files(tmp_path, hub_cache):
    folder = write_hub(tmp_path / "hub", REVIEWS, test={"sentence": ["t"], "y": [1]})
    spec = classification(files=None, columns={"text": "sentence", "label": "y"})
    assert one(spec, folder)["label"] == ["bad"]


def test_parquet_files(tmp_path):
    folder = write_hub(tmp_path / "hub", REVIEWS, test={"sentence": ["t", "u", "v"], "y": [1, 0, 1]})
    name = "test-00000-of-00001.parquet"
    spec = classification(files={"format": "parquet", "test": name}, columns={"text": "sentence", "label": "y"})
    assert one(spec, folder / "data")["label"] == ["bad", "good", "bad"]
    assert all_rows(single(spec, folder / "data" / name), "label") == ["bad", "good", "bad"]


def test_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(path, name=None, *, revision=None, cache_dir=None):
        raise ConnectionError("Couldn't reach the Hub\nafter 5 tries.")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    spec = classification(hub={"path": "some/set", "name": "part"})
    with pytest.raises(DataError) as caught:
        read(spec)
    assert str(caught.value) == (
        "Data set 'some/set' (part) could not be loaded from the hub: Couldn't reach the Hub after 5 tries. "
        "Check the network and the id, or download the files and name their folder with --data FOLDER."
    )


def test_every_format_of_the_task_schema_has_a_reader():
    formats = TaskSpec.model_fields["files"].annotation.__args__[0].model_fields["format"].annotation.__args__
    assert set(formats) == set(FORMATS)


# What is refused, and in which words


def row(**values):
    return {"t.jsonl": json.dumps(values) + "\n"}


def spans(*entries):
    return row(text="a b", spans=list(entries))


BY_POSITION = classification(files=NO_HEADER, columns={"text": 0, "label": 2})
AB = {"text": "a", "label": "b"}
TAGS = {"tokens": "a", "tags": "b"}
SPANS = jsonl("tagging", {"text": "text", "spans": "spans"})
GZIP = gzip.compress(b"text,label\na,x\n" * 100)

REFUSALS = [
    # the table as such: task, files, words of the message
    (classification(), {"test.csv": "text,label\na,x\nb,c,y\n"},
     "test.csv', line 3: expected 2 columns as in the first line, found 3"),
    (classification(), {"test.csv": 'text,label\n"a\nb\nc",x\nd\n'}, "line 5: expected 2 columns"),
    (classification(), {"test.csv": 'text,label\n"a,x\nb,y\n'}, "line 2: not valid CSV"),
    (classification(), {"test.csv": "text,text\na,x\n"}, "names column 'text' twice"),
    (classification(), {"test.csv": "txet,label\na,x\n"},
     "No column 'text'|Did you mean 'txet'?|The columns are: txet, label."),
    (classification(), {"test.csv": "text\na\n"}, "No column 'label'"),
    (BY_POSITION, {"test.csv": "a,x\n"}, "No column 2|There are 2 columns"),
    # files
    (classification(), {"test.csv.gz": GZIP[:-12]}, "test.csv.gz' is not a whole gzip file"),
    (classification(), {"test.csv.gz": b"text,label\n"}, "is not a whole gzip file"),
    (classification(), {}, "test.csv' does not exist|'test.csv.gz'|--data"),
    (classification(), {"test.csv": "text,label\nécole,x\n".encode("latin-1")},
     "test.csv' is not UTF-8: byte 11 is 0xe9|Convert the file to UTF-8"),
    (classification(), {"test.csv": ""}, "test.csv' has no rows"),
    (classification(), {"test.csv": "text,label\n"}, "test.csv' has no rows"),
    (classification(files={"format": "parquet", "test": "t.parquet"}), {"t.parquet": "no"},
     "t.parquet' is not readable Parquet"),
    (jsonl("classification"), {"t.jsonl": '{"text": "a", "label": 1}\n{"text": "b", \n'},
     "t.jsonl', line 2 is not readable JSON"),
    (jsonl("classification"), {"t.jsonl": '"text"\n'}, "row 1: expected a JSON object or list, found 'text'"),
    # rows
    (jsonl("classification"), row(text=None, label=1), "line 1: text is null"),
    (jsonl("classification", AB), row(a="x \ud83d", b=1), "holds half of a character"),
    (jsonl("classification", {"text": ["a", "b"], "label": "c"}), row(a=None, b=None, c=1), "text is null"),
    (jsonl("tagging", TAGS), row(a=None, b=[]), "tokens must be a list without null"),
    (jsonl("tagging", TAGS), row(a=["x", None], b=["O", "O"]), "tokens must be a list without"),
    (jsonl("tagging", TAGS), row(a=["x"], b=5), "tags must be a list without null, not '5'"),
    (jsonl("tagging", TAGS), row(a=["a", "b"], b=["O", "PER"]), "t.jsonl', line 1, word 2: tag 'PER' is not valid"),
    (jsonl("multi_label", {"text": "a", "labels": "b"}), row(a="x", b=5), "labels must be a list without null"),
    (jsonl("multi_label", {"text": "a", "labels": "b"}), row(a="x", b=["y", None]), "labels must be a list without"),
    (classification(drop_labels=["-"]), {"test.csv": "text,label\na,-\n"}, "No row"),
    # spans
    (SPANS, row(text=None, spans=[]), "text is null"),
    (SPANS, row(text="x", spans=3), "spans must be a list without null, not '3'"),
    (SPANS, spans(None), "line 1: spans must be a list without null"),
    (SPANS, spans({"start": 0, "end": 9, "type": "X"}), "span 0 to 9 is not within the 3 characters"),
    (SPANS, spans({"start": 2, "end": 2, "type": "X"}), "span 2 to 2 is not within"),
    (SPANS, spans({"start": 1, "end": 2, "type": "X"}), "holds white space only"),
    (SPANS, spans({"start": 1, "type": "X"}), "a span must be {start, end, type}"),
    (SPANS, spans({"start": "0", "end": 1, "type": "X"}), "start and end of a span must be whole numbers"),
    # tagged words
    (tagging(), {"test.txt": "a O\nb\n"}, "Line 2 of|test.txt' has 1 columns, 2 are needed: 'b'"),
    (tagging(), {"test.txt": "a O\n\nb B-PER\nc S-PER\n"},
     "test.txt', line 4: tag 'S-PER' is not valid in label scheme 'iob2'. It is valid in bios, bioes, bmes: set"),
    (tagging(), {"test.txt": "a B-PER\nb L-PER\n"}, "line 2: tag 'L-PER' is not valid|It is valid in bilou: set"),
    (tagging(columns={"tokens": "word"}), {"test.txt": "a O\n"}, "must be a position"),
    (classification(files=LINES, columns={"text": "seq.in"}), {"seq.in": "a b\nc\n", "label": "x\n"},
     "line counts differ: seq.in 2, label 1"),
    (SLOTS, {"seq.in": "a b\nc\n", "seq.out": "O\nO\n"}, "line 1: 2 tokens but 1 tags"),
    (CLUENER, {"t.json": json.dumps({"text": "去罗马玩", "label": {"city": {"罗马": [[0, 1]]}}})},
     "'罗马' should stand at character 0, but '去罗' does"),
    (CLUEWSC, {"t.json": wsc(("小王", 1), ("他", 5))}, "should stand at character 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "files", "said"), REFUSALS, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, spec, files, said):
    text = message(spec, write(tmp_path, **files))
    for part in said.split("|"):
        assert part in text


REFUSALS_OF_TRAIN = [
    (classification(labels=["bad", "good"]), "text,label\na,good\nb,goood\n",
     "line 3: Unknown label 'goood'. Did you mean 'good'? Known: bad, good."),
    (classification(), "text,label\na,x\nb,\n", "line 3: a row of train has no label"),
    (classification(files={"format": "csv", "train": "train.csv"}), "text,label\na,x\n",
     "has 1 rows, too few to hold some out"),
    (tagging(labels=["PER"], files={**CONLL, "train": "train.csv"}), "a B-NAME\n", "Unknown label 'NAME'"),
    (classification(kind="clasification"), "text,label\na,x\n",
     "Unknown kind 'clasification'. Did you mean 'classification'"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "content", "said"), REFUSALS_OF_TRAIN)
def test_rows_that_cannot_be_learnt_from_are_refused(tmp_path, spec, content, said):
    with pytest.raises((ConfigError, DataError), match=re.escape(said)):
        read(spec, data=write(tmp_path, train__csv=content), splits=["train"])


@pytest.mark.parametrize(("spec", "content", "said"), [
    (classification(), "text,label\na,x\nb,x\n", "one class only: ['x']"),
    (tagging(files={**CONLL, "train": "train.csv"}), "a O\n", "has no label at all"),
])  # fmt: skip
def test_labels_that_tell_nothing_apart_are_refused(tmp_path, spec, content, said):
    train = one(spec, write(tmp_path, train__csv=content), "train")
    with pytest.raises(DataError, match=re.escape(said)):
        label_names(spec, train)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("nowhere", None, "nowhere' does not exist"),
    ("mine.csv", "text,label\na,x\nb,y\n", "has 2 rows, too few"),
    ("same.csv", "text,label\na,x\nA,y\n a,x\nb,y\n", "has 2 rows with different texts, too few"),
    ("mine.xlsx", b"PK\x03\x04\x00\x00",
     "mine.xlsx' cannot be told by its suffix '.xlsx'. Expected one of .csv, .tsv"),
])  # fmt: skip
def test_one_file_that_cannot_be_divided_is_refused(tmp_path, name, content, said):
    if content is not None:
        write(tmp_path, **{name: content})
    assert said in message(classification(), tmp_path / name)


def test_a_task_without_any_source_is_refused():
    with pytest.raises(DataError, match=r"Task 'toy' comes without data.* --data"):
        read(classification())
