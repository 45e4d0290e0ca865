"""Every public task against the published counts of its data, which is not in the repository.

Set SPARSE_FT_DATA_ROOT to the folder that holds conll2003/, sst2/, tnews/ and so on, and run `pytest -m public_data`.
"""

import collections
import json
import os
import unicodedata
from pathlib import Path

import pytest

from sparse_ft.tasks.formats import read_file
from sparse_ft.tasks.reading import label_names, read, rows_seen_in_train
from sparse_ft.tasks.records import FileOptions
from sparse_ft.tasks.schemes import spans_from_tags
from sparse_ft.tasks.spec import load_task

ROOT = os.environ.get("SPARSE_FT_DATA_ROOT")
pytestmark = [
    pytest.mark.public_data,
    pytest.mark.skipif(ROOT is None, reason="SPARSE_FT_DATA_ROOT does not name a folder of public data sets"),
]

FOLDERS = {"atis_slots": "atis"}


def folder_of(name):
    return Path(str(ROOT)) / FOLDERS.get(name, name.split("/")[-1])


def load(name, *splits, **changes):
    spec = load_task(name)
    if changes:
        spec = spec.model_copy(update={**changes, "files": spec.files.model_copy(update=changes.get("files", {}))})
    return read(spec, data=folder_of(name), splits=splits)


def entities(dataset):
    """The spans of every sentence."""
    return [spans_from_tags(tags) for tags in dataset["tags"]]


def per_type(dataset):
    return dict(collections.Counter(span.type for spans in entities(dataset) for span in spans))


def tokens_in(dataset):
    return sum(len(tokens) for tokens in dataset["tokens"])


def plain(text):
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def concatenated(*datasets):
    return sorted(row for dataset in datasets for row in dataset["row"])


# Token classification

CONLL_SIZES = {
    "train": (14_041, 203_621, {"LOC": 7140, "PER": 6600, "ORG": 6321, "MISC": 3438}),
    "validation": (3_250, 51_362, {"LOC": 1837, "PER": 1842, "ORG": 1341, "MISC": 922}),
    "test": (3_453, 46_435, {"LOC": 1668, "PER": 1617, "ORG": 1661, "MISC": 702}),
}
IOB1_FILES = {"train": "iob1/eng.train", "validation": "iob1/eng.testa", "test": "iob1/eng.testb"}


@pytest.mark.parametrize("split", CONLL_SIZES)
def test_conll2003(split):
    dataset = load("conll2003", split)[split]
    sentences, tokens, types = CONLL_SIZES[split]
    assert len(dataset) == sentences
    assert tokens_in(dataset) == tokens
    assert per_type(dataset) == types
    assert not any("-DOCSTART-" in words for words in dataset["tokens"])
    assert max(len(words) for words in dataset["tokens"]) == {"train": 113, "validation": 109, "test": 124}[split]


@pytest.mark.parametrize("split", IOB1_FILES)
def test_conll2003_original_iob1_has_the_same_entities(split):
    ours = load("conll2003", split)[split]
    original = load("conll2003", split, label_scheme="iob1", files=IOB1_FILES)[split]
    assert ours["tokens"] == original["tokens"]
    assert ours["tags"] == original["tags"]
    assert entities(ours) == entities(original)


def test_conllpp_differs_in_186_sentences():
    test = load("conll2003", "test")["test"]
    corrected = load("conll2003", "test", files={"test": "test.conllpp.txt"})["test"]
    assert sum(len(spans) for spans in entities(corrected)) == 5_702
    assert sum(mine != theirs for mine, theirs in zip(test["tags"], corrected["tags"], strict=True)) == 186


def test_msra_ner_cut_entities_are_entities_of_their_own():
    """A piece that begins with ``I-``, or has it after ``O``, begins an entity, as conlleval counts it."""
    spec = load_task("msra_ner")
    dataset = load("msra_ner", "train", "validation", "test")
    assert (len(dataset["train"]), len(dataset["validation"])) == (45_593, 5_065)
    assert concatenated(dataset["train"], dataset["validation"]) == list(range(50_658))
    assert tokens_in(dataset["train"]) + tokens_in(dataset["validation"]) == 2_169_879
    both = collections.Counter(per_type(dataset["train"])) + collections.Counter(per_type(dataset["validation"]))
    assert both == {"LOC": 36517, "ORG": 20571 + 3, "PER": 17615 + 3}  # published: tags with B-; 6 rests more
    assert (len(dataset["test"]), tokens_in(dataset["test"])) == (4_631, 172_601)
    assert sum(per_type(dataset["test"]).values()) == 2877 + 1331 + 1973 + 11
    assert label_names(spec, dataset["train"]) == ["LOC", "ORG", "PER"]
    for name, cut in (("train.txt", 6), ("test.txt", 11)):
        options = FileOptions({"tokens": 0, "tags": 1}, separator="\t")
        raw = read_file(folder_of("msra_ner"), name, format="conll", options=options)
        pieces = [record.values["tags"] for record in raw]
        begins = sum(
            tag.startswith("I-") and (place == 0 or tags[place - 1] == "O")
            for tags in pieces
            for place, tag in enumerate(tags)
        )
        assert begins == cut
        assert max(len(tags) for tags in pieces) <= 100


@pytest.mark.parametrize(
    ("split", "sentences", "characters", "found"),
    [("train", 3_821, 124_099, 13_438 + 2), ("validation", 463, 13_890, 1_497), ("test", 477, 15_100, 1_630)],
)
def test_resume_ner(split, sentences, characters, found):
    """In train a sentence break cuts two entities, whose rests (``M-`` first) count as entities of their own."""
    dataset = load("resume_ner", split)[split]
    assert (len(dataset), tokens_in(dataset)) == (sentences, characters)
    assert sum(len(spans) for spans in entities(dataset)) == found
    assert set(per_type(dataset)) == {"CONT", "EDU", "LOC", "NAME", "ORG", "PRO", "RACE", "TITLE"}


# Entities as published, less the two of train that lie inside a longer one.
CLUENER_SIZES = {"train": (10_748, 23_971 - 2), "validation": (1_343, 3_072)}


@pytest.mark.parametrize("split", CLUENER_SIZES)
def test_cluener(split):
    dataset = load("clue/cluener", split)[split]
    rows, found = CLUENER_SIZES[split]
    assert len(dataset) == rows
    assert sum(len(spans) for spans in entities(dataset)) == found
    types = "address book company game government movie name organization position scene"
    assert set(per_type(dataset)) == set(types.split())
    assert max(len(text) for text in dataset["text"]) <= 50
    file = {"train": "train.json", "validation": "dev.json"}[split]
    source = read_file(folder_of("clue/cluener"), file, format="jsonl", options=FileOptions({}))
    lost = 0
    for row, record in zip(dataset, source, strict=True):
        surfaces = {
            (start, end + 1, entity_type)
            for entity_type, entries in record.values["label"].items()
            for places in entries.values()
            for start, end in places
        }
        ours = {
            (row["starts"][span.start], row["ends"][span.end - 1], span.type) for span in spans_from_tags(row["tags"])
        }
        assert ours <= surfaces
        lost += len(surfaces - ours)
    assert lost == {"train": 2, "validation": 0}[split]


def test_cluener_test_is_hidden():
    dataset = load("clue/cluener", "test")["test"]
    assert len(dataset) == 1_345
    assert set(dataset["tags"]) == {None}


def test_atis_slots():
    dataset = load("atis_slots", "train", "validation", "test")
    assert {split: len(part) for split, part in dataset.items()} == {"train": 4_478, "validation": 500, "test": 893}
    for part in dataset.values():
        assert all(len(row["tokens"]) == len(row["tags"]) for row in part)
    assert "fromloc.city_name" in label_names(load_task("atis_slots"), dataset["train"])


# Classification: rows and label counts

COUNTS = {
    ("sst2", "validation"): {"negative": 428, "positive": 444},
    ("sst2", "test"): {"negative": 912, "positive": 909},
    ("ag_news", "test"): {"World": 1900, "Sports": 1900, "Business": 1900, "Sci/Tech": 1900},
    ("clue/afqmc", "train"): {"different": 23761, "same": 10573},
    ("clue/afqmc", "validation"): {"different": 2978, "same": 1338},
    ("clue/csl", "test"): {"not_keywords": 1419, "keywords": 1419},
    ("chnsenticorp", "train"): {"negative": 4801, "positive": 4799},
    ("chnsenticorp", "validation"): {"negative": 607, "positive": 593},
    ("chnsenticorp", "test"): {"negative": 592, "positive": 608},
}
ROWS = {
    "sst2": (6_920, 872, 1_821),
    "ag_news": (9_772 - 977, 977, 7_600),
    "clinc150": (15_100, 3_100, 5_500),
    "banking77": (10_003 - 1_000, 1_000, 3_080),
    "atis": (4_478, 500, 893),
    "clue/tnews": (53_360, 10_000, 10_000),
    "clue/iflytek": (3_024, 1_373, 1_749),
    "clue/afqmc": (34_334, 4_316, 3_861),
    "clue/ocnli": (10_000 - 15, 2_950, 3_000),
    "clue/csl": (160, 160, 2_838),
    "clue/cluewsc": (160, 159, 976),
    "chnsenticorp": (9_600, 1_200, 1_200),
    "cic": (10_000, 2_000, 2_000),
}
CLASSES = {
    "clinc150": 151,
    "banking77": 77,
    "atis": 21,
    "clue/tnews": 15,
    "clue/iflytek": 119,
    "cic": 118,
    "clue/ocnli": 3,
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_labels_and_texts(name):
    spec = load_task(name)
    dataset = load(name, "train", "validation", "test")
    assert tuple(len(dataset[split]) for split in ("train", "validation", "test")) == ROWS[name]
    assert len(label_names(spec, dataset["train"])) == CLASSES.get(name, len(spec.labels or []))
    assert set(dataset["train"]["label"]) <= set(label_names(spec, dataset["train"]))
    for split, part in dataset.items():
        assert all(part["text"])
        hidden = split in spec.files.unlabelled
        assert (set(part["label"]) == {None}) if hidden else (None not in part["label"])
        if (name, split) in COUNTS:
            assert collections.Counter(part["label"]) == COUNTS[name, split]


def test_sst2_phrases():
    train = load("sst2", "train", files={"train": "train.tsv"})["train"]
    assert collections.Counter(train["label"]) == {"negative": 29_780, "positive": 37_569}


def test_ag_news_joins_title_and_description():
    dataset = load("ag_news", "train", "validation", "test")
    both = collections.Counter(dataset["train"]["label"]) + collections.Counter(dataset["validation"]["label"])
    assert both == {"World": 2410, "Sports": 2517, "Business": 2450, "Sci/Tech": 2395}
    source = read_file(folder_of("ag_news"), "test.csv", format="csv", options=FileOptions({}, header=False))
    assert [len(record.values) for record in source] == [3] * 7_600
    assert dataset["test"]["text"] == [f"{record.values[1]} {record.values[2]}" for record in source]


def test_clinc150_is_balanced():
    dataset = load("clinc150", "train", "validation", "test")
    for split, each, outside in (("train", 100, 100), ("validation", 20, 100), ("test", 30, 1_000)):
        counts = collections.Counter(dataset[split]["label"])
        assert counts.pop("oos") == outside
        assert set(counts.values()) == {each}
        assert len(counts) == 150
        assert dataset[split]["row"] == list(range(len(dataset[split])))


def test_banking77_fields_and_classes():
    dataset = load("banking77", "train", "validation", "test")
    counts = collections.Counter(dataset["train"]["label"]) + collections.Counter(dataset["validation"]["label"])
    assert (min(counts.values()), max(counts.values())) == (35, 187)
    assert set(collections.Counter(dataset["test"]["label"]).values()) == {40}
    assert set(counts) == set(json.loads((folder_of("banking77") / "categories.json").read_text(encoding="utf-8")))
    assert any("\n" in text for text in dataset["train"]["text"])
    assert concatenated(dataset["train"], dataset["validation"]) == list(range(10_003))


def test_atis_labels_that_train_does_not_have_are_kept():
    dataset = load("atis", "train", "validation", "test")
    known = set(dataset["train"]["label"])
    assert len(set(dataset["test"]["label"]) - known) == 4
    assert "atis_day_name" in set(dataset["test"]["label"]) - known
    assert len(set(dataset["validation"]["label"]) - known) == 1
    assert dataset["train"]["label"].count("atis_flight") / len(dataset["train"]) == pytest.approx(0.74, abs=0.01)


def test_tnews_labels():
    counts = collections.Counter(load("clue/tnews", "train")["train"]["label"])
    assert (counts["news_stock"], counts["news_tech"]) == (257, 5955)
    assert min(counts.values()) == 257
    assert max(counts.values()) == 5955


def test_iflytek_line_separators_do_not_break_records():
    dataset = load("clue/iflytek", "train", "validation", "test")
    assert any("\u2028" in text for part in dataset.values() for text in part["text"])
    assert max(len(text) for part in dataset.values() for text in part["text"]) == 1_876
    assert [len(set(dataset[split]["label"])) for split in ("validation", "test")] == [117, 98]


def test_descriptions_in_the_data_are_the_names_of_the_task():
    for name, column in (("clue/tnews", "label_desc"), ("clue/iflytek", "label_des"), ("cic", "label_des")):
        described = load(name, "validation", columns={"text": "sentence", "label": column})["validation"]
        assert described["label"] == load(name, "validation")["validation"]["label"], name


def test_ocnli_rows_without_majority_are_left_out_but_counted():
    dataset = load("clue/ocnli", "train", "validation")
    assert len(dataset["validation"]) == 2_950
    assert dataset["validation"]["row"][-1] == 2_999
    assert dataset["train"]["row"][-1] >= 9_985


def test_csl_keywords_are_joined():
    row = load("clue/csl", "train")["train"][0]
    source = read_file(folder_of("clue/csl"), "train.json", format="jsonl", options=FileOptions({}))[0].values
    assert row["text_pair"] == " ".join(source["keyword"])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_cluewsc_marks(split):
    for text in load("clue/cluewsc", split)[split]["text"]:
        assert text.count("[") >= 1
        assert text.count("_") >= 2


def test_cic_classes():
    assert len(set(load("cic", "test")["test"]["label"])) == 112


@pytest.mark.parametrize("name", ROWS)
def test_the_example_of_a_task_is_not_from_its_data(name):
    dataset = load(name, "train", "validation", "test")
    example = {plain(part) for part in load_task(name).example.split("|||")}
    assert not example & {plain(text) for part in dataset.values() for text in part["text"]}


# Overlap with train

OVERLAPPING = [
    *("sst2", "clinc150", "banking77", "atis", "atis_slots", "clue/tnews", "chnsenticorp", "cic"),
    *("conll2003", "msra_ner", "resume_ner"),
]


@pytest.mark.parametrize("name", OVERLAPPING)
def test_leaks_are_those_found_by_comparing_texts(name):
    """``row`` must fit the published list, and no overlap may be missing from it."""
    spec = load_task(name)
    dataset = load(name, "train", "validation", "test")
    tagging = spec.kind == "token_classification"
    shortest = 5 if tagging and name != "atis_slots" else 0  # shorter sentences are not counted in the tagging sets

    def texts(part):
        return ["".join(tokens) for tokens in part["tokens"]] if tagging else part["text"]

    seen = {plain(text) for text in texts(dataset["train"])}
    if spec.files.validation is None:
        seen |= {plain(text) for text in texts(dataset["validation"])}
    for split in ("validation", "test"):
        if split == "validation" and spec.files.validation is None:
            assert split not in spec.leaks
            continue
        part = dataset[split]
        lengths = [len(tokens) for tokens in part["tokens"]] if tagging else [shortest] * len(part)
        found = {
            row
            for row, text, length in zip(part["row"], texts(part), lengths, strict=True)
            if length >= shortest and plain(text) in seen
        }
        listed = rows_seen_in_train(spec, split, data=folder_of(name))
        assert listed == (set() if split in spec.files.unlabelled else found)
