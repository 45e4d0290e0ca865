"""Word shapes: how a word is written, for backbones whose tokenizer drops case.

An uncased backbone reads "china" and "China" as the same token. An expert that tags words may own one vector per shape;
it is added to the hidden state of each piece of a word where that expert's lowest block begins. The shapes are named in
words.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.experts.routing import Routing


class WordShapes(nn.Module):
    """The shape vectors of all experts; most experts have none.

    Args:
        hidden_size: Width of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.tables = nn.ParameterList()  # per expert [shapes, hidden], or [0, hidden]
        self.blocks: list[int] = []

    def add(self, table: Tensor | None, *, block: int, device: torch.device) -> None:
        """Append an expert.

        Args:
            table: [shapes, hidden], or None for an expert that does not look at shapes.
            block: Before which the vectors are added.
            device: Where the hidden states are.
        """
        values = torch.zeros(0, self.hidden_size) if table is None else table
        self.tables.append(nn.Parameter(values.to(device, torch.float32)))
        self.blocks.append(block)

    def remove(self, index: int) -> None:
        """Take one expert out; those behind it move up by one."""
        self.tables = nn.ParameterList(table for place, table in enumerate(self.tables) if place != index)
        del self.blocks[index]

    def blocks_of(self, present: Sequence[int] | None) -> dict[int, list[int]]:
        """Return the experts among ``present`` (None: all) that have vectors, by the block where these are added."""
        found: dict[int, list[int]] = {}
        for index in range(len(self.tables)) if present is None else present:
            if len(self.tables[index]):
                found.setdefault(self.blocks[index], []).append(index)
        return found

    def added(self, hidden: Tensor, shapes: Tensor, *, routing: Routing, chosen: Sequence[int]) -> Tensor:
        """Add the vectors of the experts ``chosen``, by the weight that they have in each row or token.

        Args:
            hidden: [N, S, hidden].
            shapes: [N, S], indices in SHAPES.
            routing: Of these rows.
            chosen: Experts with vectors.
        """
        known = (shapes > 0).to(hidden.dtype)  # [N, S]
        for index in chosen:
            weights = routing.weights_of(index).to(hidden.dtype)  # [N, 1] or [N, S]
            vectors = functional.embedding(shapes, self.tables[index]).to(hidden.dtype)  # [N, S, hidden]
            hidden = hidden + (known * weights).unsqueeze(-1) * vectors
        return hidden
