"""One of several choices: answers to a question about a text, or what fills a blank in it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.words import BLANK
from sparse_ft.tasks.kinds.answers import ChoiceAnswer
from sparse_ft.tasks.kinds.kind import IGNORED, Columns

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.scores import Score


class MultipleChoice:
    """Exactly one of a row's choices is right; rows may have different numbers of them.

    The model reads one example a choice, the text as the first of a pair and question and choice as the second, and
    gives each one logit. The softmax is over the choices of a row.
    """

    level: Literal["text", "word"] = "text"
    by_row = True

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """One: how well a choice fits."""
        return ["fit"]

    def parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Number of choices of each row."""
        return [len(choices) for choices in columns["choices"]]

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode one example a choice; the target is 1 for the right one, else 0.

        A text that is too long is cut at its end; one with a blank evenly around it, so that the blank is never lost.
        """
        questions = columns.get("text_pair") or [None] * len(columns["text"])
        answers = columns.get("answer")
        texts, seconds, places = [], [], []
        for row, (text, question, choices) in enumerate(
            zip(columns["text"], questions, columns["choices"], strict=True)
        ):
            own = [f"{question} {choice}" if question else choice for choice in choices]
            texts += [around_blank(text, own, encoder)] * len(own)
            seconds += own
            places += [(row, choice) for choice in range(len(own))]
        return [
            replace(
                example,
                row=row,
                word_indices=[choice],
                targets=[] if answers is None else [IGNORED if answers[row] is None else int(answers[row] == choice)],
            )
            for example, (row, choice) in zip(encoder.texts(texts, seconds), places, strict=True)
        ]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Cross-entropy of ``logits`` [choices, 1] of one row, whose ``targets`` [choices] are 1 for the right one."""
        right = targets.argmax(0, keepdim=True)
        return functional.cross_entropy(logits.T, right, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[int]:
        """The place of the choice with the highest logit."""
        return [int(row.argmax()) for row in logits]

    def references(self, columns: Columns) -> list[Any]:
        """The ``answer`` column: the place of the right choice."""
        return list(columns["answer"])

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> "Score":
        """Share of rows with the right choice."""
        from sparse_ft.tasks.kinds.scores import score_choices  # seconds to import, and prediction does not need it

        return score_choices(references, predictions)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the choices of a row, [..., choices, 1]."""
        return logits.softmax(-2)

    def logits(self, probabilities: Tensor) -> Tensor:
        """Logarithms, which the softmax over the choices turns back."""
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> ChoiceAnswer:
        """Return ``{"label", "choice", "score"}``: the choice, its place from 0 and its probability.

        Args:
            logits: [choices, 1], of one row.
            text: Not needed.
            labels: The choices of the row.
            language: Not needed.
        """
        probabilities = logits.squeeze(-1).softmax(-1)
        best = int(probabilities.argmax())
        return {"label": labels[best], "choice": best, "score": float(probabilities[best])}


def around_blank(text: str, seconds: Sequence[str], encoder: Encoder) -> str:
    """Cut a text with a blank so that it fits beside the longest of its choices."""
    place = text.find(BLANK)
    if place < 0:
        return text
    longest = max(len(example.input_ids) for example in encoder.texts([""] * len(seconds), seconds))
    return encoder.around(text, place, tokens=max(len(BLANK), encoder.max_length - longest))
