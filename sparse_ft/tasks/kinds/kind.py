"""The interface of a task kind."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds.answers import Answer
from sparse_ft.tasks.kinds.scores import Score

Columns = Mapping[str, Sequence[Any]]

IGNORED = -100
"""Target of an example or a word that has no part in the loss; the default ``ignore_index`` of torch."""


class TaskKind(Protocol):
    """How the rows of a kind of task are encoded, learned, decoded and scored."""

    level: Literal["text", "word"]
    """Whether the head reads one vector per text or one per word."""
    grouped: bool
    """Whether the logits of a row are compared with each other, so that its examples must be learned together."""
    exclusive: bool
    """Whether one softmax is over all outputs, or over all parts of a row if ``grouped``; else each has a sigmoid."""
    answer_column: str
    """Column of the true answers, in the form of ``predictions``; an answer is None where it is hidden."""

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Name the outputs of a head for these labels."""
        ...

    def num_parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Count the parts of each row that have logits: its words or its choices; None if the row itself has them."""
        ...

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode rows; with targets where ``columns`` holds the answers.

        Args:
            columns: The columns that ``reading.read`` returns; in prediction without answers.
            encoder: Encoder of the backbone.
            labels: All label names of the task, in the order of the head.
            language: Language of the task; decides how raw text is split into words.
        """
        ...

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the mean loss over rows or words, float32; of one row if the kind is ``grouped``."""
        ...

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[Any]:
        """Turn the logits of each row of ``columns`` into the form that ``score`` compares with the answers."""
        ...

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> Score:
        """Compare predictions with the truth."""
        ...

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> Answer:
        """Turn the logits of one text into its entry in ``predict --json``."""
        ...


def probabilities_of(kind: TaskKind, logits: Tensor) -> Tensor:
    """Turn logits [..., outputs], or [..., parts, outputs] of a ``grouped`` kind, into probabilities of that shape."""
    if not kind.exclusive:
        return logits.sigmoid()
    return logits.softmax(-2 if kind.grouped else -1)


def logits_of(kind: TaskKind, probabilities: Tensor) -> Tensor:
    """Return logits that have these probabilities; 0, and 1 of a sigmoid, become the nearest number with a logit."""
    if not kind.exclusive:
        return probabilities.logit(torch.finfo(torch.float32).eps)
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
