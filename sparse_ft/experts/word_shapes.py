"""Word shapes: how a word is written, for backbones whose tokenizer drops case.

An uncased backbone reads "china" and "China" as the same token. An expert that tags words may therefore have one vector
per shape, added to the hidden state of each piece of a word before the expert's lowest block. words.py lists the
shapes. Shapes of tensors: N rows, S tokens a row, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.experts.routing import Routing


class WordShapes(nn.Module):
    """The vectors of all experts, one per word shape; most experts have none.

    Args:
        hidden_size: Width of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.tables = nn.ParameterList()  # per expert [shapes, H], or [0, H]
        self.blocks: list[int] = []

    def add(self, table: Tensor | None, *, block: int, device: torch.device) -> None:
        """Append an expert.

        Args:
            table: [shapes, H], or None for an expert that does not use shapes.
            block: 0-based block before which the vectors are added.
            device: Device of the hidden states.
        """
        values = torch.zeros(0, self.hidden_size) if table is None else table
        self.tables.append(nn.Parameter(values.to(device, torch.float32)))
        self.blocks.append(block)

    def remove(self, index: int) -> None:
        """Remove one expert; the indices of those behind it fall by one."""
        self.tables = nn.ParameterList(table for other, table in enumerate(self.tables) if other != index)
        del self.blocks[index]

    def blocks_of(self, present: Sequence[int] | None) -> dict[int, list[int]]:
        """Return block to the experts among ``present`` (None: all) whose vectors are added before it."""
        experts: dict[int, list[int]] = {}
        for index in range(len(self.tables)) if present is None else present:
            if len(self.tables[index]):
                experts.setdefault(self.blocks[index], []).append(index)
        return experts

    def starts(self, index: int, block: int) -> bool:
        """Whether the vectors of an expert are added before a block."""
        return self.blocks[index] == block and len(self.tables[index]) > 0

    def added(self, hidden: Tensor, shapes: Tensor, *, routing: Routing, experts: Sequence[int]) -> Tensor:
        """Add the vectors of experts to hidden states, weighted by the routing.

        Args:
            hidden: [N, S, H].
            shapes: [N, S], indices in SHAPES.
            routing: Routing of these rows.
            experts: Indices of experts with vectors.
        """
        known = (shapes > 0).to(hidden.dtype)  # [N, S]
        for index in experts:
            weights = routing.weights_of(index).to(hidden.dtype)  # [N, 1] or [N, S]
            vectors = functional.embedding(shapes, self.tables[index]).to(hidden.dtype)  # [N, S, H]
            hidden = hidden + (known * weights).unsqueeze(-1) * vectors
        return hidden
