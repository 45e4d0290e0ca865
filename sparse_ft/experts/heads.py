"""Task heads: linear layers from hidden states to a task's outputs, always in float32."""

import torch
from torch import Tensor, nn

from sparse_ft.experts.named_experts import named_generator
from sparse_ft.experts.routing import RoutingSlot


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
