"""What is legal as a whole: IOB2 tags with an ``I-`` only after its own type, and spans that end after they start."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import NEVER
from sparse_ft.tasks.schemes import split_tag

MAX_WORDS = 100
"""Longest answer; in Chinese a word is a character. The longest of CMRC 2018's development set has 88."""


def best_legal_tags(logits: Tensor, tags: Sequence[str]) -> list[int]:
    """Find the legal sequence with the highest sum of log-probabilities (Viterbi 1967).

    Formula: Viterbi, "Error bounds for convolutional codes", https://doi.org/10.1109/TIT.1967.1054010, with transition
    costs of 0 and infinity.

    Args:
        logits: [words, tags], of one text.
        tags: IOB2 names of the columns.

    Returns:
        One column a word. Where the best tag of every word is legal, this is the best tag of every word.
    """
    best = logits.argmax(-1).tolist()
    if not best:
        return []
    path = ["O", *(tags[place] for place in best)]
    if all(_follows(left, right) for left, right in pairwise(path)):
        return best
    forbidden = torch.tensor([[not _follows(left, right) for right in tags] for left in tags])  # [from, to]
    log_probabilities = logits.double().log_softmax(-1)
    first = torch.tensor([not _follows("O", tag) for tag in tags])
    score = log_probabilities[0].masked_fill(first, -torch.inf)  # [tags], of the best path that ends so
    origins = []
    for word in log_probabilities[1:]:
        arriving = score.unsqueeze(1).masked_fill(forbidden, -torch.inf)  # [from, to]
        score, origin = arriving.max(0)
        score = score + word
        origins.append(origin.tolist())
    place = int(score.argmax())
    chosen = [place]
    for origin in reversed(origins):
        place = origin[place]
        chosen.append(place)
    return chosen[::-1]


def best_span(logits: Tensor) -> tuple[int, int]:
    """Find the span with the highest sum of its start and end logits, of at most MAX_WORDS words.

    Args:
        logits: [words, 2], start and end, of one text.

    Returns:
        The first and the last word; (-1, -1) if there are no words.
    """
    number = len(logits)
    if not number:
        return -1, -1
    missing = logits[:, 1] <= NEVER  # the first output of a word without a token says nothing
    starts, ends = logits[:, 0].masked_fill(missing, NEVER), logits[:, 1]
    width = min(MAX_WORDS, number)
    padded = functional.pad(ends, (0, width - 1), value=-torch.inf)
    sums = starts.unsqueeze(1) + padded.unfold(0, width, 1)  # [words, width], by start and length
    first, length = divmod(int(sums.argmax()), width)
    return first, first + length


def _follows(left: str, right: str) -> bool:
    """Tell whether a tag may stand after another."""
    prefix, entity_type = split_tag(right)
    return prefix != "I" or split_tag(left)[1] == entity_type
