import itertools

import pytest

from sparse_ft.errors import DataError
from sparse_ft.tasks.schemes import (
    SCHEMES,
    Span,
    first_invalid,
    schemes_of,
    spans_from_tags,
    split_tag,
    tags_from_spans,
    to_iob2,
)


def test_split_tag_keeps_dashes_of_the_type():
    assert split_tag("B-from-loc.city") == ("B", "from-loc.city")
    assert split_tag("O") == ("O", "")


@pytest.mark.parametrize(("scheme", "tags", "expected"), [
    ("iob1", "I-X I-X B-X I-Y O I-X", "B-X I-X B-X B-Y O B-X"),
    ("iob2", "B-X I-X B-X B-Y O B-X", "B-X I-X B-X B-Y O B-X"),
    ("iob2", "I-X I-X O I-Y I-X", "B-X I-X O B-Y B-X"),
    ("bioes", "B-X E-X S-X S-Y O S-X", "B-X I-X B-X B-Y O B-X"),
    ("bmes", "B-X M-X E-X S-X O B-Y E-Y", "B-X I-X I-X B-X O B-Y I-Y"),
    ("bmes", "B-X M-X O M-X E-X E-X", "B-X I-X O B-X I-X B-X"),
    ("bmes", "B-X B-X E-Y", "B-X B-X B-Y"),
    ("bilou", "B-X I-X L-X U-X O U-Y L-Y", "B-X I-X I-X B-X O B-Y B-Y"),
    ("BILOU", "U-X U-X", "B-X B-X"),
    ("bios", "B-X I-X S-X I-X O I-X", "B-X I-X B-X B-X O B-X"),
    ("ioe2", "I-X E-X E-X E-Y O I-X I-X", "B-X I-X B-X B-Y O B-X I-X"),
    ("BIO", "I-X I-X B-X", "B-X I-X B-X"),
    ("iobes", "B-X E-X S-X", "B-X I-X B-X"),
])  # fmt: skip
def test_to_iob2(scheme, tags, expected):
    assert to_iob2(tags.split(), scheme) == expected.split()


def test_conversion_to_iob2_is_idempotent_and_keeps_the_spans():
    for tags in itertools.product(["O", "B-X", "I-X", "B-Y", "I-Y"], repeat=4):
        once = to_iob2(tags)
        assert to_iob2(once) == once
        assert spans_from_tags(once) == spans_from_tags(tags)


def test_spans_and_tags_are_inverse():
    for tags in itertools.product(["O", "B-X", "I-X", "B-Y", "I-Y"], repeat=4):
        iob2 = to_iob2(tags)
        assert tags_from_spans(spans_from_tags(iob2), len(iob2)) == iob2


def test_spans_as_conlleval_reads_them():
    assert spans_from_tags(["I-X", "I-X", "B-X", "O", "I-Y", "I-X"]) == [
        Span("X", 0, 2),
        Span("X", 2, 3),
        Span("Y", 4, 5),
        Span("X", 5, 6),
    ]
    assert spans_from_tags([]) == []


def test_of_overlapping_spans_the_first_given_wins():
    assert tags_from_spans([Span("X", 1, 3), Span("Y", 2, 4)], 4) == ["O", "B-X", "I-X", "O"]


@pytest.mark.parametrize("tag", ["S-X", "X", "B-", "b-X", "", "O-X", "BI-X"])
def test_the_first_invalid_tag(tag):
    assert first_invalid(["O", tag], "iob2") == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outside_is_valid_everywhere(scheme):
    assert first_invalid(["O"], scheme) is None


def test_the_schemes_of_tags():
    assert schemes_of(["B-X", "L-X"]) == ["bilou"]
    assert schemes_of(["B-X", "S-X"]) == ["bios", "bioes", "bmes"]
    assert schemes_of(["X"]) == []


@pytest.mark.parametrize("name", ["BILUO", "bioul", "BILOU"])
def test_other_names_of_a_scheme(name):
    assert to_iob2(["B-X", "L-X", "U-Y"], name) == ["B-X", "I-X", "B-Y"]


def test_unknown_scheme():
    with pytest.raises(DataError, match=r"Unknown label_scheme 'iob3'.*Known: iob1, iob2, .*, bilou, bmes"):
        first_invalid(["O"], "iob3")
