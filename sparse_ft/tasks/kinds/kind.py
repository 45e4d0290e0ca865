"""What every task kind can do."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds.answers import Answer

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.scores import Score
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.scores import Score

Columns = Mapping[str, Sequence[Any]]


class TaskKind(Protocol):
    """How the rows of a kind of task are encoded, learnt, decoded and scored."""

    level: Literal["text", "word"]
    """Whether the head reads one vector a text or one a word."""
    by_row: bool
    """Whether the parts of a row are compared with each other, so that all of them must be learnt together."""

    def outputs(self, labels: Sequence[str]) -> list[str]:
        """Name the head's outputs for these labels."""
        ...

    def parts(self, columns: Columns, *, language: str) -> list[int] | None:
        """Count what each row gives logits for: its words, or its choices. None: the rows themselves."""
        ...

    def encode(self, columns: Columns, *, encoder: Encoder, labels: Sequence[str], language: str) -> list[Example]:
        """Encode rows; with targets where ``columns`` holds the answers.

        Args:
            columns: The reader's columns; in prediction only those that ask: ``text``, ``text_pair``, ``choices``.
            encoder: Of the backbone.
            labels: All label names of the task, in the order of the head.
            language: Of the task; decides how raw text is split into words.
        """
        ...

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the mean loss over rows or words, float32; of one row if the kind goes ``by_row``."""
        ...

    def predictions(self, logits: Sequence[Tensor], *, columns: Columns, labels: Sequence[str]) -> list[Any]:
        """Turn the logits of each row of ``columns`` into what ``score`` compares with ``references``."""
        ...

    def references(self, columns: Columns) -> list[Any]:
        """Return the true answers in the form of ``predictions``; None where they are hidden."""
        ...

    def score(
        self, references: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[str], out_of_scope: str | None
    ) -> "Score":
        """Compare predictions with the truth."""
        ...

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits into probabilities of the outputs, of the same shape."""
        ...

    def logits(self, probabilities: Tensor) -> Tensor:
        """Return logits that have these ``probabilities``."""
        ...

    def answer(self, logits: Tensor, *, text: str, labels: Sequence[str], language: str) -> Answer:
        """Turn the logits of one text into its entry in ``predict --json``."""
        ...


IGNORED = -100
