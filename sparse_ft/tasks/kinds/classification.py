"""One label a text, or a pair of texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds.answers import LabelAnswer
from sparse_ft.tasks.kinds.kind import Columns

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.scores import Score
from sparse_ft.tasks.kinds.kind import IGNORED


class Classification:
    """Exactly one of the labels is right."""

    level: Literal["text", "word"] = "text"
    by_row = False

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """One output a label."""
        return list(labels)

    def parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """A row is one."""
        return None

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode one example a row; the target is the label's index, -100 where it is hidden or unknown."""
        examples = encoder.texts(columns["text"], columns.get("text_pair"))
        if "label" not in columns:
            return examples
        index = {label: place for place, label in enumerate(labels)}
        return [replace(example, targets=[index.get(columns["label"][example.row], IGNORED)]) for example in examples]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Cross-entropy of ``logits`` [rows, labels] against ``targets`` [rows]."""
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[str]:
        """The label with the highest logit."""
        return [labels[int(row.argmax())] for row in logits]

    def references(self, columns: Columns) -> list[Any]:
        """The ``label`` column."""
        return list(columns["label"])

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> "Score":
        """Accuracy, F1 averages, report and confusion matrix."""
        from sparse_ft.tasks.kinds.scores import score_classification

        return score_classification(references, predictions, labels=labels, out_of_scope=out_of_scope)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the labels."""
        return logits.softmax(-1)

    def logits(self, probabilities: Tensor) -> Tensor:
        """The logarithm; a probability of 0 becomes the least that float32 holds."""
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> LabelAnswer:
        """Return ``{"label", "score"}``; the score is the softmax probability, 0 to 1."""
        probabilities = self.probabilities(logits)
        best = int(probabilities.argmax())
        return {"label": labels[best], "score": float(probabilities[best])}
