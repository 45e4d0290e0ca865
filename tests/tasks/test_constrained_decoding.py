"""The best legal tags, against trying out every sequence."""

import itertools

import pytest
import torch

from sparse_ft.backbone.encoding import NO_TOKEN_LOGIT
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.constrained_decoding import MAX_WORDS, best_legal_tags, best_span
from sparse_ft.tasks.kinds.kind import logits_of

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def is_legal(sequence):
    before = ["O", *sequence]
    return all(
        not tag.startswith("I-") or left[2:] == tag[2:] for left, tag in zip(before, sequence, strict=False)
    )  # the last of before has no tag behind it


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_all_legal_sequences(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1 + seed % 5, len(TAGS), generator=generator, dtype=torch.float64) * 3
    sums = {
        places: float(logits.log_softmax(-1)[range(len(logits)), list(places)].sum())
        for places in itertools.product(range(len(TAGS)), repeat=len(logits))
        if is_legal([TAGS[index] for index in places])
    }
    assert tuple(best_legal_tags(logits, TAGS)) == max(sums, key=sums.__getitem__)


def test_no_entity_goes_over_a_line_break():
    logits = torch.tensor([[0.0, 9, 0, 0, 0], [0, 0, 9, 0, 0], [0, 0, 9, 8, 0], [0, 0, 0, 0, 9], [0, 0, 0, 0, 9]])
    path = [TAGS[column] for column in best_legal_tags(logits, TAGS, line_starts={2, 4})]
    assert path == ["B-PER", "I-PER", "B-LOC", "I-LOC", "B-LOC"]
    unsure = torch.tensor([[0.0, 9, 0, 0, 0], [1.0, 0.5, 0.8, 0, 0]])  # O is best, but PER of either tag is better
    assert best_legal_tags(unsure, TAGS, line_starts={1}) == [1, 1]
    assert best_legal_tags(unsure, TAGS) == [1, 0]


@pytest.mark.parametrize("averaged", [False, True])
def test_a_word_without_a_token_does_not_divide_an_entity(averaged):
    wanted = ["O", "B-PER", "?", "?", "I-PER", "?", "B-LOC", "?", "O", "?"]
    logits = torch.full((len(wanted), len(TAGS)), NO_TOKEN_LOGIT)
    logits[:, 0] = 0.0
    for word, tag in enumerate(wanted):
        if tag != "?":
            logits[word] = torch.tensor([9.0 if tag == name else 0.0 for name in TAGS])
    if averaged:
        logits = logits_of(find_kind("token_classification"), logits.softmax(-1))
    path = [TAGS[column] for column in best_legal_tags(logits, TAGS)]
    assert path == ["O", "B-PER", "I-PER", "I-PER", "I-PER", "O", "B-LOC", "O", "O", "O"]
    broken = [TAGS[column] for column in best_legal_tags(logits, TAGS, line_starts={3})]
    assert broken[:4] == ["O", "B-PER", "O", "O"]


def test_no_words():
    assert best_legal_tags(torch.zeros(0, len(TAGS)), TAGS) == []


@pytest.mark.parametrize("words", [1, 2, 7, 130])
def test_the_best_span_is_that_of_an_exhaustive_search(words):
    logits = torch.randn(words, 2, generator=torch.Generator().manual_seed(words))
    spans = [(first, last) for first in range(words) for last in range(first, min(words, first + MAX_WORDS))]
    assert best_span(logits) == max(spans, key=lambda span: float(logits[span[0], 0] + logits[span[1], 1]))


def test_a_span_is_not_longer_than_allowed_nor_ends_before_it_starts():
    logits = torch.zeros(MAX_WORDS + 50, 2)
    logits[0, 0], logits[-1, 1] = 5.0, 9.0
    first, last = best_span(logits)
    assert (last, last - first < MAX_WORDS) == (MAX_WORDS + 49, True)
    backwards = torch.tensor([[0.0, 9.0], [0.0, 0.0], [9.0, 0.0]])
    assert best_span(backwards) in {(2, 2), (0, 0)}


def test_a_word_without_a_token_neither_starts_nor_ends_a_span():
    logits = torch.full((4, 2), -3.0)
    logits[0, 0], logits[0, 1] = 0.0, NO_TOKEN_LOGIT  # as row_logits leaves it
    assert best_span(logits)[0] > 0
    assert best_span(torch.zeros(0, 2)) == (-1, -1)
