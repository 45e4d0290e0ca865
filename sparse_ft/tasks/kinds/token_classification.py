"""Entities: one tag a word."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.words import split_words
from sparse_ft.tasks.kinds.answers import EntitiesAnswer, Entity
from sparse_ft.tasks.kinds.decoding import best_legal_tags
from sparse_ft.tasks.kinds.kind import IGNORED, Columns
from sparse_ft.tasks.schemes import spans_from_tags

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.scores import Score


class TokenClassification:
    """Each word is outside or in an entity of one type; tags are IOB2."""

    level: Literal["text", "word"] = "word"
    by_row = False

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """``O``, then ``B-`` and ``I-`` of each entity type."""
        return ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")]

    def parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Number of words of each row."""
        return [len(words) for words in words_of(columns, language)]

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode given words, or raw text split into words; long rows become windows; one target a word.

        Rows with ``parents`` have tags for pieces of their words, so they have no targets.
        """
        examples = encoder.words(words_of(columns, language))
        if "tags" not in columns or "parents" in columns:
            return examples
        index = {tag: place for place, tag in enumerate(self.outputs(labels))}
        return [
            replace(
                example,
                targets=[index.get(columns["tags"][example.row][word], IGNORED) for word in example.word_indices],
            )
            for example in examples
        ]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Cross-entropy of ``logits`` [words, tags] against ``targets`` [words]."""
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[list[str]]:
        """The best tags that are legal together; rows with ``parents`` get those of their pieces."""
        tags = self.outputs(labels)
        found = [[tags[place] for place in best_legal_tags(row, tags)] for row in logits]
        if "parents" not in columns:
            return found
        return [_of_pieces(row, parents) for row, parents in zip(found, columns["parents"], strict=True)]

    def references(self, columns: Columns) -> list[Any]:
        """The ``tags`` column."""
        return list(columns["tags"])

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> "Score":
        """Entity scores as conlleval counts them, and token scores with ``O``."""
        from sparse_ft.tasks.kinds.scores import score_tagging  # seconds to import, and prediction does not need it

        return score_tagging(references, predictions, labels=self.outputs(labels))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the tags."""
        return logits.softmax(-1)

    def logits(self, probabilities: Tensor) -> Tensor:
        """The logarithm; a probability of 0 becomes the least that float32 holds."""
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> EntitiesAnswer:
        """Return ``{"entities": [{"type", "text", "start", "end", "score"}, …]}``.

        ``start`` and ``end`` count characters of the text as given; the score is the mean probability of its tags.
        """
        words, tags = split_words(text, language), self.outputs(labels)
        places = best_legal_tags(logits, tags)
        chosen = torch.tensor(places, dtype=torch.long).unsqueeze(1)
        probabilities = self.probabilities(logits).gather(1, chosen).squeeze(1)
        entities: list[Entity] = []
        for span in spans_from_tags([tags[place] for place in places]):
            start, end = words[span.start].start, words[span.end - 1].end
            score = float(probabilities[span.start : span.end].mean())
            entities.append({"type": span.type, "text": text[start:end], "start": start, "end": end, "score": score})
        return {"entities": entities}


def _of_pieces(tags: Sequence[str], parents: Sequence[int]) -> list[str]:
    """Give every piece of a word its tag; an entity that begins at the word begins at its first piece."""
    return [
        f"I-{tags[parent][2:]}" if place and parents[place - 1] == parent and tags[parent] != "O" else tags[parent]
        for place, parent in enumerate(parents)
    ]


def words_of(columns: Columns, language: str) -> Sequence[Sequence[str]]:
    """Return the words of each row, as given or split from its text."""
    if "tokens" in columns and "parents" not in columns:
        return columns["tokens"]
    return [[word.text for word in split_words(text, language)] for text in columns["text"]]
