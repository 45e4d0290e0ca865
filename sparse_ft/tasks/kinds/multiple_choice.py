"""One of several choices: answers to a question about a text, or words for a blank in it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.words import BLANK
from sparse_ft.tasks.kinds.answers import ChoiceAnswer
from sparse_ft.tasks.kinds.kind import IGNORED, Columns
from sparse_ft.tasks.kinds.scores import Score, score_choices


class MultipleChoice:
    """Exactly one of a row's choices is right; rows may differ in their number of choices.

    The model reads one example per choice: the text as the first of a pair, question and choice as the second. Each
    example gets one logit, and the softmax is over the choices of a row.
    """

    level: Literal["text", "word"] = "text"
    grouped = True
    exclusive = True
    answer_column = "answer"

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Return the one output: how well a choice fits."""
        return ["fit"]

    def num_parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Return the number of choices of each row."""
        return [len(choices) for choices in columns["choices"]]

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode one example per choice; the target is 1 for the right choice, else 0, and IGNORED if it is hidden.

        A text that is too long is cut at its end; a text with a blank is cut on both sides, so that the blank stays.
        """
        questions = columns.get("text_pair") or [None] * len(columns["text"])
        answers = columns.get("answer")
        texts, seconds, origins = [], [], []
        for row, (text, question, choices) in enumerate(
            zip(columns["text"], questions, columns["choices"], strict=True)
        ):
            with_question = [f"{question} {choice}" if question else choice for choice in choices]
            texts += [around_blank(text, with_question, encoder)] * len(choices)
            seconds += with_question
            origins += [(row, choice) for choice in range(len(choices))]
        return [
            replace(
                example,
                row=row,
                word_indices=[choice],
                targets=[] if answers is None else [IGNORED if answers[row] is None else int(answers[row] == choice)],
            )
            for example, (row, choice) in zip(encoder.texts(texts, seconds), origins, strict=True)
        ]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the cross-entropy of the ``logits`` [choices, 1] of one row; ``targets`` [choices] mark one choice."""
        right = targets.argmax(0, keepdim=True)
        return functional.cross_entropy(logits.T, right, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[int]:
        """Return the index of the choice with the highest logit of each row."""
        return [int(row.argmax()) for row in logits]

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> Score:
        """Compute the share of rows with the right choice."""
        return score_choices(references, predictions)

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> ChoiceAnswer:
        """Return ``{"label", "choice", "score"}``: the choice, its 0-based index and its probability.

        Args:
            logits: [choices, 1], of one row.
            text: Unused.
            labels: The choices of the row.
            language: Unused.
        """
        probabilities = logits.squeeze(-1).softmax(-1)
        best = int(probabilities.argmax())
        return {"label": labels[best], "choice": best, "score": float(probabilities[best])}


def around_blank(text: str, seconds: Sequence[str], encoder: Encoder) -> str:
    """Cut a text with a blank so that it fits into an example with the longest of ``seconds``."""
    blank = text.find(BLANK)
    if blank < 0:
        return text
    longest = max(len(example.input_ids) for example in encoder.texts([""] * len(seconds), seconds))
    return encoder.around(text, blank, tokens=max(len(BLANK), encoder.max_length - longest))
