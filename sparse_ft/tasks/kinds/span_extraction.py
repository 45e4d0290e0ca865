"""A span of a text that answers a question about the text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.words import split_words
from sparse_ft.tasks.kinds.answers import SpanAnswer
from sparse_ft.tasks.kinds.constrained_decoding import best_span
from sparse_ft.tasks.kinds.kind import IGNORED, Columns
from sparse_ft.tasks.kinds.scores import Score, score_answers
from sparse_ft.tasks.kinds.token_classification import words_of

_START, _END = 1, 2
"""Bits of the target of a word."""


class SpanExtraction:
    """The answer stands in the text, from one word to another.

    Long texts are read in windows, each behind the question. A word has one start and one end logit, from the window
    that shows most of its context. The softmax is over all words of the text, so that windows can be compared
    (Clark and Gardner 2018, "shared normalization", https://aclanthology.org/P18-1078).
    """

    level: Literal["text", "word"] = "word"
    grouped = True
    exclusive = True
    answer_column = "answers"

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Return two outputs: the answer starts at a word, and it ends there."""
        return ["start", "end"]

    def num_parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Return the number of words of each text."""
        return [len(words) for words in words_of(columns, language)]

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode the windows of each text with one target per word, IGNORED in rows without an answer in the text."""
        examples = encoder.words(words_of(columns, language), questions=columns["text_pair"])
        if "answers" not in columns:
            return examples
        encoded: dict[int, set[int]] = {}  # row -> its words that have a token
        for example in examples:
            encoded.setdefault(example.row, set()).update(example.word_indices)
        targets = [self._targets(columns, row, encoded[row]) for row in range(len(columns["text"]))]
        return [
            replace(
                example,
                targets=[targets[example.row].get(word, 0) for word in example.word_indices]
                if targets[example.row]
                else [IGNORED] * len(example.word_indices),
            )
            for example in examples
        ]

    def _targets(self, columns: Columns, row: int, encoded: set[int]) -> dict[int, int]:
        """Return the targets of the first and the last word of a row's first answer that stands in the text."""
        for answer, start in zip(columns["answers"][row] or [], columns["answer_starts"][row] or [], strict=True):
            if start < 0:
                continue
            words = enumerate(zip(columns["starts"][row], columns["ends"][row], strict=True))
            inside = [
                word
                for word, (left, right) in words
                if word in encoded and left < start + len(answer) and right > start
            ]
            if inside:
                return {inside[0]: _START | _END} if len(inside) == 1 else {inside[0]: _START, inside[-1]: _END}
        return {}

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the mean of the cross-entropies of start and end over the words of one row.

        Args:
            logits: [words, 2].
            targets: [words], 1 where the answer starts, 2 where it ends, 3 where it does both.
            label_smoothing: Share of the probability that is spread over all words.
        """
        right = torch.stack([(targets & bit).argmax() for bit in (_START, _END)])
        return functional.cross_entropy(logits.T, right, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[list[str]]:
        """Return the text of the best span of each row, alone in a list."""
        answers = []
        for row, (first, last) in enumerate(map(best_span, logits)):
            text, starts, ends = (columns[name][row] for name in ("text", "starts", "ends"))
            answers.append([text[starts[first] : ends[last]] if first >= 0 else ""])
        return answers

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> Score:
        """Compute exact match and F1 as CMRC 2018 counts them."""
        return score_answers(references, predictions)

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> SpanAnswer:
        """Return ``{"answer", "start", "end", "score"}``.

        ``start`` and ``end`` count characters of the text as given. The score is the product of the probabilities that
        the answer starts and ends there.
        """
        first, last = best_span(logits)
        if first < 0:
            return {"answer": "", "start": 0, "end": 0, "score": 0.0}
        words, probabilities = split_words(text, language), logits.softmax(0)
        start, end = words[first].start, words[last].end
        score = float(probabilities[first, 0] * probabilities[last, 1])
        return {"answer": text[start:end], "start": start, "end": end, "score": score}
