"""Entities: one tag per word."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.words import Word, line_starts, split_words
from sparse_ft.tasks.kinds.answers import EntitiesAnswer, Entity
from sparse_ft.tasks.kinds.constrained_decoding import best_legal_tags, has_token
from sparse_ft.tasks.kinds.kind import IGNORED, Columns
from sparse_ft.tasks.kinds.scores import Score, score_tagging
from sparse_ft.tasks.schemes import spans_from_tags, split_tag


class TokenClassification:
    """Each word is outside of all entities or in an entity of one type; tags are IOB2."""

    level: Literal["text", "word"] = "word"
    grouped = False
    exclusive = True
    answer_column = "tags"

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Return ``O``, then ``B-`` and ``I-`` of each entity type."""
        return ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")]

    def num_parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Return the number of words of each row."""
        return [len(words) for words in words_of(columns, language)]

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode the words of each row, a long row as windows, with the index of its tag as the target of each word.

        Rows with ``parents`` have tags for pieces of their words, so they have no targets.
        """
        examples = encoder.words(words_of(columns, language))
        if "tags" not in columns or "parents" in columns:
            return examples
        indices = {tag: index for index, tag in enumerate(self.outputs(labels))}
        return [
            replace(
                example,
                targets=[indices.get(columns["tags"][example.row][word], IGNORED) for word in example.word_indices],
            )
            for example in examples
        ]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the cross-entropy of ``logits`` [words, tags] against ``targets`` [words]."""
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[list[str]]:
        """Return the best legal tags of each row; in rows with ``parents``, those of the pieces of its words."""
        tags = self.outputs(labels)
        starts = _line_starts(columns, len(logits))
        predicted = [
            [tags[index] for index in best_legal_tags(row, tags, line_starts=breaks)]
            for row, breaks in zip(logits, starts, strict=True)
        ]
        if "parents" not in columns:
            return predicted
        return [_piece_tags(row, parents) for row, parents in zip(predicted, columns["parents"], strict=True)]

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> Score:
        """Compute entity scores as conlleval counts them, and token scores with ``O``."""
        return score_tagging(references, predictions, labels=self.outputs(labels))

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> EntitiesAnswer:
        """Return ``{"entities": [{"type", "text", "start", "end", "score"}, …]}``.

        ``start`` and ``end`` count characters of the text as given. The score is the probability of the type, ``B-`` or
        ``I-``, averaged over the words of the entity.
        """
        words, tags = split_words(text, language), self.outputs(labels)
        path = best_legal_tags(logits, tags, line_starts=line_starts(words, text))
        columns = torch.tensor(path, dtype=torch.long).unsqueeze(1)  # [words, 1]
        probabilities = type_probabilities(logits.softmax(-1), tags).gather(1, columns).squeeze(1)  # [words]
        seen = has_token(logits)  # [words]
        entities: list[Entity] = []
        for span in spans_from_tags([tags[index] for index in path]):
            start, end = words[span.start].start, words[span.end - 1].end
            within = slice(span.start, span.end)
            score = float(probabilities[within][seen[within]].mean())
            entities.append({"type": span.type, "text": text[start:end], "start": start, "end": end, "score": score})
        return {"entities": entities}


def type_probabilities(probabilities: Tensor, tags: Sequence[str]) -> Tensor:
    """Return for each tag the probability of its entity type, the sum of ``B-`` and ``I-``.

    Args:
        probabilities: [..., tags].
        tags: IOB2 names of the columns.
    """
    types = [split_tag(tag)[1] for tag in tags]
    same = [[left == right for right in types] for left in types]  # [tags, tags]
    sums = probabilities @ torch.tensor(same, dtype=probabilities.dtype)  # [..., tags]
    return sums.clamp(max=1.0)  # a sum of float32 may exceed 1


def _piece_tags(tags: Sequence[str], parents: Sequence[int]) -> list[str]:
    """Give every piece the tag of its word; an entity that begins at the word begins at its first piece."""
    return [
        f"I-{tags[parent][2:]}" if piece and parents[piece - 1] == parent and tags[parent] != "O" else tags[parent]
        for piece, parent in enumerate(parents)
    ]


def _line_starts(columns: Columns, number: int) -> list[set[int]]:
    """Return the words of each row that begin a line; none in rows of tokens, which have no text."""
    if "starts" not in columns:
        return [set()] * number
    starts = []
    for row, text in enumerate(columns["text"]):
        pieces = [Word("", *edges) for edges in zip(columns["starts"][row], columns["ends"][row], strict=True)]
        breaks = line_starts(pieces, text)
        starts.append({columns["parents"][row][piece] for piece in breaks} if "parents" in columns else breaks)
    return starts


def words_of(columns: Columns, language: str) -> Sequence[Sequence[str]]:
    """Return the words of each row: its tokens, or those of its raw text where a model must not see the tokens."""
    if "tokens" in columns and "parents" not in columns:
        return columns["tokens"]
    return [[word.text for word in split_words(text, language)] for text in columns["text"]]
