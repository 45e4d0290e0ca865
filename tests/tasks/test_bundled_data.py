"""The samples that come with the package."""

import itertools
import re
import unicodedata

import pytest

from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.schemes import first_invalid, spans_from_tags
from sparse_ft.tasks.spec import SPLITS, load_task

SAMPLES = ["sentiment", "topic", "intent", "ner"]
LEAST = {"train": 400, "validation": 100, "test": 100}


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request):
    spec = load_task(request.param)
    return spec, {split: rows.to_dict() for split, rows in read(spec).items()}


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def texts_of(columns) -> list[str]:
    return columns["text"] if "text" in columns else [" ".join(tokens) for tokens in columns["tokens"]]


def test_there_are_enough_rows_of_every_split(sample):
    _, splits = sample
    assert list(splits) == list(SPLITS)
    for split, least in LEAST.items():
        assert len(splits[split]["row"]) >= least


def test_every_label_is_in_every_split(sample):
    spec, splits = sample
    for split, columns in splits.items():
        if spec.kind == "token_classification":
            labels = {span.type for tags in columns["tags"] for span in spans_from_tags(tags)}
        else:
            labels = set(columns["label"])
        assert labels == set(spec.label_names), split
    assert label_names(spec, read(spec, splits=["train"])["train"]) == spec.label_names


def test_no_text_stands_twice(sample):
    _, splits = sample
    places: dict[str, str] = {}
    for split, columns in splits.items():
        for row, text in enumerate(texts_of(columns)):
            place = f"{split} row {row}"
            assert normalised(text)
            assert places.setdefault(normalised(text), place) == place, text


def test_no_text_is_almost_one_of_another_split(sample):
    """Two texts of three words or more have less than 7 of 10 words in common."""
    _, splits = sample
    words = {
        split: [set(re.findall(r"\w+", text.casefold())) for text in texts_of(rows)] for split, rows in splits.items()
    }
    for one, other in itertools.combinations(words.values(), 2):
        for left, right in itertools.product(one, other):
            assert min(len(left), len(right)) < 3 or len(left & right) < 0.7 * len(left | right), (left, right)


def test_no_label_has_more_than_its_share(sample):
    """A sample on which always giving one answer would score well would show nothing."""
    spec, splits = sample
    if spec.kind == "token_classification":
        with_entities = [any(tag != "O" for tag in tags) for tags in splits["test"]["tags"]]
        assert sum(with_entities) > len(with_entities) / 2
        return
    for columns in splits.values():
        largest = max(columns["label"].count(label) for label in spec.label_names)
        assert largest <= max(0.6, 2 / len(spec.label_names)) * len(columns["label"])


def test_tags_are_valid_and_match_their_words():
    for columns in (rows.to_dict() for rows in read(load_task("ner")).values()):
        for tokens, tags in zip(columns["tokens"], columns["tags"], strict=True):
            assert len(tokens) == len(tags)
            assert first_invalid(tags, "iob2") is None
            for before, tag in zip(["O", *tags], tags, strict=False):
                if tag.startswith("I-"):
                    assert before[1:] == tag[1:]  # IOB2: an entity begins with B
            assert all(token.strip() == token != "" for token in tokens)


def test_texts_are_clean(sample):
    _, splits = sample
    for columns in splits.values():
        for text in texts_of(columns):
            assert text == text.strip()
            assert "\ufffd" not in text
            assert all(character.isprintable() for character in text), text


def test_the_example_is_not_from_the_data(sample):
    spec, splits = sample
    assert spec.example
    assert spec.license == "CC0-1.0"
    assert normalised(spec.example) not in {normalised(text) for text in texts_of(splits["test"])}
