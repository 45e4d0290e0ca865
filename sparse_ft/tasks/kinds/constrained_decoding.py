"""The best legal outputs: IOB2 tags with an ``I-`` only after its own type, and spans that end after they start."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import NO_TOKEN_LOGIT
from sparse_ft.tasks.schemes import split_tag

MAX_WORDS = 100
"""Longest answer; in Chinese a word is a character. The longest of CMRC 2018's development set has 88."""

_NO_TOKEN_MARGIN = -80.0
"""Words without a token have logits further below that of ``O``: NO_TOKEN_LOGIT, or the logarithm of the least float32
in an ensemble, which is -87."""


def best_legal_tags(logits: Tensor, tags: Sequence[str], *, line_starts: Collection[int] = ()) -> list[int]:
    """Find the legal sequence of tags with the highest sum of log-probabilities.

    No entity crosses a line break: the first word of a line begins one if it is in one. A word without a token is
    inside an entity if the words around it are.

    Algorithm: Viterbi 1967, "Error bounds for convolutional codes", https://doi.org/10.1109/TIT.1967.1054010, with
    transition costs of 0 and infinity.

    Args:
        logits: [words, tags], of one text.
        tags: IOB2 names of the columns, ``O`` first.
        line_starts: Indices of the words that begin a line.

    Returns:
        One column per word. If the best tags of all words are legal together, these are returned.
    """
    seen = has_token(logits).nonzero().flatten().tolist()
    starts = {index for word in line_starts if (index := bisect_left(seen, word)) < len(seen)}
    path = [0] * len(logits)
    for word, tag in zip(seen, _best_path(_begun_at(logits[seen], tags, starts), tags), strict=True):
        path[word] = tag
    for left, right in pairwise(seen):
        if split_tag(tags[path[right]])[0] == "I":
            path[left + 1 : right] = [path[right]] * (right - left - 1)
    return path


def has_token(logits: Tensor) -> Tensor:
    """Tell which words the backbone sees: [words] bool for logits [words, outputs]."""
    return (logits[:, 1:] - logits[:, :1]).amax(-1) > _NO_TOKEN_MARGIN


def _begun_at(logits: Tensor, tags: Sequence[str], starts: Collection[int]) -> Tensor:
    """Return logits in which some words begin an entity if they are in one: ``I-`` is added to ``B-`` of its type."""
    if not starts:
        return logits
    rows = torch.tensor(sorted(starts))
    logits = logits.clone()
    for column, (prefix, entity_type) in enumerate(map(split_tag, tags)):
        if prefix == "I":
            begins = tags.index(f"B-{entity_type}")
            logits[rows, begins] = torch.logaddexp(logits[rows, begins], logits[rows, column])
            logits[rows, column] = -torch.inf
    return logits


def _best_path(logits: Tensor, tags: Sequence[str]) -> list[int]:
    """Find the best legal tags of words that have tokens."""
    best = logits.argmax(-1).tolist()
    if not best:
        return []
    names = ["O", *(tags[column] for column in best)]
    if all(_may_follow(left, right) for left, right in pairwise(names)):
        return best
    forbidden = torch.tensor([[not _may_follow(left, right) for right in tags] for left in tags])  # [from, to]
    log_probabilities = logits.double().log_softmax(-1)
    first = torch.tensor([not _may_follow("O", tag) for tag in tags])
    score = log_probabilities[0].masked_fill(first, -torch.inf)  # [tags], of the best path that ends in each tag
    origins = []
    for word in log_probabilities[1:]:
        arriving = score.unsqueeze(1).masked_fill(forbidden, -torch.inf)  # [from, to]
        score, origin = arriving.max(0)
        score = score + word
        origins.append(origin.tolist())
    path = [int(score.argmax())]
    for origin in reversed(origins):
        path.append(origin[path[-1]])
    return path[::-1]


def best_span(logits: Tensor) -> tuple[int, int]:
    """Find the span with the highest sum of its start and end logits, of at most MAX_WORDS words.

    Args:
        logits: [words, 2], start and end, of one text.

    Returns:
        The first and the last word; (-1, -1) if there are no words.
    """
    length = len(logits)
    if not length:
        return -1, -1
    missing = logits[:, 1] <= NO_TOKEN_LOGIT  # words without a token, whose start logit means nothing
    starts, ends = logits[:, 0].masked_fill(missing, NO_TOKEN_LOGIT), logits[:, 1]
    width = min(MAX_WORDS, length)
    padded = functional.pad(ends, (0, width - 1), value=-torch.inf)
    sums = starts.unsqueeze(1) + padded.unfold(0, width, 1)  # [words, width], by first word and length - 1
    first, further = divmod(int(sums.argmax()), width)
    return first, first + further


def _may_follow(left: str, right: str) -> bool:
    """Tell whether a tag may stand after another."""
    prefix, entity_type = split_tag(right)
    return prefix != "I" or split_tag(left)[1] == entity_type
