"""Any number of labels per text, or per pair of texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds.answers import LabelsAnswer
from sparse_ft.tasks.kinds.kind import Columns
from sparse_ft.tasks.kinds.scores import Score, score_multi_label

THRESHOLD = 0.5
"""Lowest probability of a label that is predicted."""


class MultiLabel:
    """Each label is right or wrong independently of the others; a row may have none."""

    level: Literal["text", "word"] = "text"
    grouped = False
    exclusive = False
    answer_column = "labels"

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Return one output per label."""
        return list(labels)

    def num_parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Return None: each row has one vector of logits."""
        return None

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode one example per row; the targets are 0.0 or 1.0 for each label."""
        examples = encoder.texts(columns["text"], columns.get("text_pair"), language=language)
        if "labels" not in columns:
            return examples
        rows = [set(row or []) for row in columns["labels"]]
        return [
            replace(example, targets=[float(label in rows[example.row]) for label in labels]) for example in examples
        ]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the binary cross-entropy of ``logits`` against ``targets``, both [rows, labels].

        Label smoothing moves the targets towards 0.5.
        """
        smoothed = targets * (1 - label_smoothing) + 0.5 * label_smoothing
        return functional.binary_cross_entropy_with_logits(logits, smoothed)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[list[str]]:
        """Return the labels of each row whose probability is at least THRESHOLD."""
        return [
            [labels[index] for index in (row.sigmoid() >= THRESHOLD).nonzero().flatten().tolist()] for row in logits
        ]

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> Score:
        """Compute F1 averages over labels and over rows, and the share of rows with exactly the right labels."""
        return score_multi_label(references, predictions, labels=labels)

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> LabelsAnswer:
        """Return ``{"labels": [{"label", "score"}, …]}``, the most probable first; the score is the probability."""
        probabilities = logits.sigmoid()
        order = probabilities.argsort(descending=True).tolist()
        chosen = [index for index in order if probabilities[index] >= THRESHOLD]
        return {"labels": [{"label": labels[index], "score": float(probabilities[index])} for index in chosen]}
