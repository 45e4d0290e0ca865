"""Tasks in a model: the experts that serve each, and its head, a float32 linear layer from hidden states to outputs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_ft.experts.named_experts import named_generator
from sparse_ft.experts.routing import RoutingSlot


@dataclass(frozen=True)
class TaskSlot:
    """A task in the model: the experts that serve it, and the input of its head."""

    experts: tuple[str, ...]
    """The task's own experts: usually one; a gate chooses among several (domains, or a pool)."""
    level: str
    """``text`` or ``word``."""
    joint: bool = False
    """Whether the task was trained together with the gate, which then mixes all its experts for the task's rows."""
    shared: str | None = None
    """The expert that each of the task's rows uses in addition to its own."""

    @property
    def used(self) -> list[str]:
        """All experts that the task's rows use."""
        return [*self.experts, *([] if self.shared is None else [self.shared])]

    @property
    def gated(self) -> bool:
        """Whether a gate decides even though the task is known."""
        return self.joint or len(self.experts) > 1


def common_expert(slots: Sequence[TaskSlot]) -> str | None:
    """Return the expert that tasks with experts of their own use in addition; None if there is none, or several."""
    owners = Counter(slot.experts for slot in slots)  # tasks of a pool have no experts of their own
    shared = {slot.shared for slot in slots if not slot.joint and owners[slot.experts] == 1} - {None}
    return shared.pop() if len(shared) == 1 else None


class Head(nn.Module):
    """A linear layer over pooled texts or over words, with dropout before it.

    Args:
        hidden_size: Width of the hidden states.
        num_outputs: Number of labels, or of tags.
        slot: Holds the generator of dropout.
    """

    def __init__(self, hidden_size: int, num_outputs: int, *, slot: RoutingSlot) -> None:
        super().__init__()
        self.slot = slot
        self.dropout = 0.0
        """Probability in training, 0 to 1."""
        self.linear = nn.Linear(hidden_size, num_outputs)

    def initialise(self, *, seed: int, name: str) -> None:
        """Draw the weights with BERT's standard deviation of 0.02; they depend on ``seed`` and the task's name only."""
        generator = named_generator(seed, f"head/{name}")
        with torch.no_grad():
            self.linear.weight.normal_(0.0, 0.02, generator=generator)
            self.linear.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:  # [rows or words, hidden] -> [rows or words, outputs]
        """Return one logit per output, float32."""
        hidden = hidden.float()
        return self.linear(self.slot.dropout(hidden, self.dropout) if self.training and self.dropout else hidden)
