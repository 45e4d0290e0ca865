"""Tasks that are asked of the same texts: they form a group, within which a gate for texts does not choose."""

import itertools
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Example
from sparse_ft.experts.gates import PrototypeGate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.selection import Selection

_LOG = logging.getLogger("sparse_ft")

_SAME_TEXTS = 0.5
"""Two experts are asked of the same texts if this share of the distinct texts of one are texts of the other."""
_MISTAKEN = 0.35
"""Two experts have texts from one source if a gate mistakes this share of held-out texts; 0.5 is chance."""
_FEWEST_ROWS, _MOST_ROWS = 60, 1000
"""Rows of each expert by which the gate's mistakes are measured; with fewer, the share is no evidence."""
_FOLDS = 5
_COMPARED = 100
"""Characters by which texts are compared: their beginnings, which tasks of every kind read alike."""


class Pair(NamedTuple):
    """Two experts whose texts are the same or alike."""

    first: str
    second: str
    why: str
    """The sign, for a sentence."""


def rivals(model: SparseExpertModel, names: Sequence[str]) -> list[str]:
    """Return the experts that may form groups: not those of a task that the gate divides among several."""
    divided = {name for slot in model.tasks.values() if len(slot.experts) > 1 for name in slot.experts}
    return [name for name in names if name not in divided]


def pairs_by_text(examples: Mapping[str, Sequence[Example]], tokenizer: Any) -> list[Pair]:
    """Find experts with the same texts, by letters and digits, whatever their case, spaces and punctuation.

    Args:
        examples: Training rows by expert.
        tokenizer: Of the backbone.
    """
    texts = {name: _normalised(rows, tokenizer) for name, rows in examples.items()}
    pairs = []
    for first, second in itertools.combinations(texts, 2):
        fewer = max(1, min(len(texts[first]), len(texts[second])))
        share = len(texts[first] & texts[second]) / fewer
        if share >= _SAME_TEXTS:
            pairs.append(Pair(first, second, f"{share:.0%} of the texts are the same"))
    return pairs


def _normalised(rows: Sequence[Example], tokenizer: Any) -> set[str]:
    texts = tokenizer.batch_decode([row.input_ids for row in rows])
    letters = ("".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold())) for text in texts)
    return {text[:_COMPARED] for text in letters}


def pairs_by_state(means: Mapping[str, Tensor]) -> list[Pair]:
    """Find experts whose texts a gate cannot tell apart: a classifier two-sample test on held-out texts.

    Lopez-Paz and Oquab 2017, https://arxiv.org/abs/1610.06545. The classifier is a prototype gate.

    Args:
        means: Mean hidden states of texts by expert, [rows, blocks, H], in random order.
    """
    top = {name: rows[:_MOST_ROWS, -1:] for name, rows in means.items() if len(rows) >= _FEWEST_ROWS}
    logits = _held_out_logits(list(top.values())) if len(top) > 1 else []
    pairs = []
    for (first, name), (second, other) in itertools.combinations(enumerate(top), 2):
        wrong = logits[first][:, second] > logits[first][:, first], logits[second][:, first] > logits[second][:, second]
        mistaken = sum(float(rows.float().mean()) for rows in wrong) / 2
        if mistaken >= _MISTAKEN:
            pairs.append(Pair(name, other, f"a gate mistakes one for the other in {mistaken:.0%} of held-out texts"))
    return pairs


@torch.no_grad()
def _held_out_logits(means: Sequence[Tensor]) -> list[Tensor]:
    """Return logits [rows, experts] for each expert's rows [rows, blocks, H], of gates fitted without these rows."""
    _, num_blocks, hidden_size = means[0].shape
    names = [str(index) for index in range(len(means))]
    gate = PrototypeGate(names, hidden_size, block=num_blocks - 1, selection=Selection())
    logits = [torch.zeros(len(rows), len(means)) for rows in means]
    for fold in range(_FOLDS):
        held_out = [torch.arange(len(rows)) % _FOLDS == fold for rows in means]
        fitted = [rows[~mask] for rows, mask in zip(means, held_out, strict=True)]
        gate.standardise(torch.cat(fitted))
        gate.fit([gate.features(rows) for rows in fitted])
        for into, rows, mask in zip(logits, means, held_out, strict=True):
            into[mask] = gate.classifier(gate.features(rows[mask]))
    return logits


def joined(names: Sequence[str], pairs: Sequence[Pair]) -> list[list[str]]:
    """Divide experts into groups: two of a pair are in one, and so is everything that pairs connect."""
    groups = {name: [name] for name in names}
    for first, second, _ in pairs:
        if groups[first] is not groups[second]:
            merged = [name for name in names if name in groups[first] or name in groups[second]]
            groups |= dict.fromkeys(merged, merged)
    return [group for name, group in groups.items() if group[0] == name]


def distinct(examples: Mapping[str, Sequence[Example]], names: Sequence[str]) -> list[Example]:
    """Return the rows of the first expert, then those rows of the others whose text no expert before them has."""
    rows = list(examples[names[0]])
    seen = {tuple(row.input_ids) for row in rows}
    for name in names[1:]:
        rows += [row for row in examples[name] if tuple(row.input_ids) not in seen]
        seen |= {tuple(row.input_ids) for row in examples[name]}
    return rows


def announce(model: SparseExpertModel, groups: Sequence[Sequence[str]], pairs: Sequence[Pair]) -> None:
    """Log every group of several experts by its tasks, with the signs."""
    for group in groups:
        tasks = [task for task, slot in model.tasks.items() if not set(slot.experts).isdisjoint(group)]
        signs = "; ".join(f"{first} and {second}: {why}" for first, second, why in pairs if first in group)
        if len(group) > 1:
            _LOG.info(
                "%s and %s are asked of the same texts: they form one group and are answered together (%s)",
                ", ".join(tasks[:-1]), tasks[-1], signs,
            )  # fmt: skip
