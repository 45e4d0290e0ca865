"""One label per text, or per pair of texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds.answers import LabelAnswer
from sparse_ft.tasks.kinds.kind import IGNORED, Columns
from sparse_ft.tasks.kinds.scores import Score, score_classification


class Classification:
    """Exactly one of the labels is right."""

    level: Literal["text", "word"] = "text"
    grouped = False
    exclusive = True
    answer_column = "label"

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Return one output per label."""
        return list(labels)

    def num_parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Return None: each row has one vector of logits."""
        return None

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode one example per row; the target is the index of its label, IGNORED if that is hidden or unknown."""
        examples = encoder.texts(columns["text"], columns.get("text_pair"), language=language)
        if "label" not in columns:
            return examples
        indices = {label: index for index, label in enumerate(labels)}
        return [replace(example, targets=[indices.get(columns["label"][example.row], IGNORED)]) for example in examples]

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the cross-entropy of ``logits`` [rows, labels] against ``targets`` [rows]."""
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing)

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[str]:
        """Return the label with the highest logit of each row."""
        return [labels[int(row.argmax())] for row in logits]

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> Score:
        """Compute accuracy, F1 averages, report and confusion matrix."""
        return score_classification(references, predictions, labels=labels, out_of_scope=out_of_scope)

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> LabelAnswer:
        """Return ``{"label", "score"}``; the score is the softmax probability, 0 to 1."""
        probabilities = logits.softmax(-1)
        best = int(probabilities.argmax())
        return {"label": labels[best], "score": float(probabilities[best])}
