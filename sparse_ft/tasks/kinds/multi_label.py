"""Any number of labels a text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds.answers import LabelsAnswer
from sparse_ft.tasks.kinds.kind import Columns

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.scores import Score

THRESHOLD = 0.5


class MultiLabel:
    """Each label is right or not, for itself; none at all is an answer, too."""

    level: Literal["text", "word"] = "text"
    by_row = False

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """One output a label."""
        return list(labels)

    def parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """A row is one."""
        return None

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode one example a row; the target is one 0.0 or 1.0 a label."""
        examples = encoder.texts(columns["text"], columns.get("text_pair"))
        if "labels" not in columns:
            return examples
        return [replace(example, targets=_indicators(columns["labels"][example.row], labels)) for example in examples]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Binary cross-entropy of ``logits`` against ``targets``, both [rows, labels]; smoothing pulls towards 0.5."""
        smoothed = targets * (1 - label_smoothing) + 0.5 * label_smoothing
        return functional.binary_cross_entropy_with_logits(logits, smoothed)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[list[str]]:
        """The labels whose probability is at least one half."""
        return [
            [labels[place] for place in (row.sigmoid() >= THRESHOLD).nonzero().flatten().tolist()] for row in logits
        ]

    def references(self, columns: Columns) -> list[Any]:
        """The ``labels`` column."""
        return list(columns["labels"])

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> "Score":
        """F1 averages over labels and over rows, and the share of rows that are right altogether."""
        from sparse_ft.tasks.kinds.scores import score_multi_label  # seconds to import, and prediction does not need it

        return score_multi_label(references, predictions, labels=labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Each label's own."""
        return logits.sigmoid()

    def logits(self, probabilities: Tensor) -> Tensor:
        """The inverse of the sigmoid; 0 and 1 become the nearest that float32 tells apart from them."""
        return probabilities.logit(torch.finfo(torch.float32).eps)

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> LabelsAnswer:
        """Return ``{"labels": [{"label", "score"}, …]}``, the most probable first; the score is the probability."""
        probabilities = self.probabilities(logits)
        order = probabilities.argsort(descending=True).tolist()
        chosen = [place for place in order if probabilities[place] >= THRESHOLD]
        return {"labels": [{"label": labels[place], "score": float(probabilities[place])} for place in chosen]}


def _indicators(row_labels: Sequence[str] | None, labels: Sequence[str]) -> list[float]:
    return [float(label in (row_labels or [])) for label in labels]
