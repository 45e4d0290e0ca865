"""The layout of the expert bank: where the LoRAs of many experts stand in one tensor.

Shapes: N rows, S tokens a row, K experts a row, E experts of the model, I inputs, C columns (rank by rank) that one row
uses, M sets of experts: N, or 1 for all rows.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.experts.routing import Routing

_FEW = 2
"""All rows are multiplied by all experts of a batch if these are at most this many times the experts of one row."""


class BankLayout:
    """The position of each expert in the banks, made once per combination of ranks, scales and experts.

    Args:
        ranks: Rank of every expert, 0 for one that does not change the layer.
        scales: alpha / r of every expert.
        present: Indices of the experts that stand in the banks, one after another.
    """

    def __init__(self, ranks: tuple[int, ...], scales: tuple[float, ...], present: Sequence[int]) -> None:
        self.ranks, self.scales = ranks, scales
        self.piece = math.gcd(*ranks) or 1
        """Number of columns of A that always stand side by side."""
        self.starts, total = [0] * len(ranks), 0
        for index in present:
            self.starts[index] = total
            total += ranks[index]
        self._tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @staticmethod
    @lru_cache(maxsize=256)
    def of(ranks: tuple[int, ...], scales: tuple[float, ...], present: tuple[int, ...] | None = None) -> "BankLayout":
        """Return the layout of banks with the experts ``present``; None: all."""
        return BankLayout(ranks, scales, range(len(ranks)) if present is None else present)

    def slices(self, index: int, in_features: int) -> tuple[slice, slice]:
        """Return the slices of an expert's A and B in the banks."""
        start, stop = self.starts[index], self.starts[index] + self.ranks[index]
        return slice(start * in_features, stop * in_features), slice(1 + start, 1 + stop)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return starts, ranks and scales, each [E]."""
        if device not in self._tensors:
            self._tensors[device] = (
                torch.tensor(self.starts, device=device),
                torch.tensor(self.ranks, device=device),
                torch.tensor(self.scales, device=device, dtype=torch.float32),
            )
        return self._tensors[device]

    def runs(self, routing: Routing) -> list[tuple[tuple[int, ...], slice]] | None:
        """Return ``Routing.runs`` for layers of this layout, computed once for all of them."""
        key = (self, "runs")
        if key not in routing.cache:
            routing.cache[key] = routing.runs(self.ranks)
        runs: list[tuple[tuple[int, ...], slice]] | None = routing.cache[key]
        return runs

    def columns(self, routing: Routing, needed: tuple[int, ...]) -> "BankColumns":
        """Return the columns of a routing's experts, computed once for all layers of this layout."""
        if self not in routing.cache:
            routing.cache[self] = BankColumns(self, routing, needed)
        columns: BankColumns = routing.cache[self]
        return columns


class BankColumns:
    """The positions in the banks of the columns of a routing's experts, as M sets.

    Args:
        layout: Layout of the banks.
        routing: Routing of the rows.
        needed: The routing's experts that have a rank in the layout.
    """

    def __init__(self, layout: BankLayout, routing: Routing, needed: tuple[int, ...]) -> None:
        device = routing.weights.device
        starts, ranks, scales = layout.tensors(device)
        experts, self._common = routing.experts, None
        if experts is None or len(needed) <= _FEW * experts.shape[1]:  # one set for all rows
            self._common = torch.tensor(needed, device=device)
            experts = self._common.unsqueeze(0)
        self.sets, num_experts = experts.shape
        # As wide as the largest rank present, not of all experts: an expert outside the batch changes nothing in it.
        width = max(layout.ranks[index] for index in needed)
        owners = experts.repeat_interleave(width, -1)  # [M, C]
        indices = torch.arange(num_experts, device=device).repeat_interleave(width)  # [C]
        steps = torch.arange(width, device=device).repeat(num_experts)  # [C]
        real = steps < ranks[owners]  # [M, C]
        if self._common is not None:  # all rows use the same columns, so none is padding
            owners, indices, steps = owners[real].unsqueeze(0), indices[real[0]], steps[real[0]]
            real = torch.ones_like(owners, dtype=torch.bool)
        self._indices = indices
        self._scales = torch.where(real, scales[owners], 0.0).unsqueeze(1)  # [M, 1, C]
        starts, ranks, steps = starts[owners] * real, ranks[owners] * real, steps * real  # [M, C]
        self.rows = functional.pad(1 + starts + steps, (0, 1)).flatten()
        """Rows of the bank of B, [M * (C + 1)]; the last of each set is the bias."""
        self._first, self._step, self._rank = (
            part[:, :: layout.piece].unsqueeze(1) // layout.piece for part in (starts, steps, ranks)
        )
        self._pieces: dict[int, Tensor] = {}
        self._weights: Tensor | None = None

    def pieces(self, in_features: int) -> Tensor:
        """Return the indices of the pieces of A in their bank, [M * I * C / piece]."""
        if in_features not in self._pieces:
            inputs = torch.arange(in_features, device=self._rank.device).view(1, -1, 1)
            self._pieces[in_features] = (self._first * in_features + self._step + inputs * self._rank).flatten()
        return self._pieces[in_features]

    def weights(self, routing: Routing) -> Tensor:
        """Return the weights on the columns, times the scales of their experts: [N, 1 or S, C]."""
        learns = torch.is_grad_enabled() and routing.weights.requires_grad
        if self._weights is not None and not learns:
            return self._weights
        weights = routing.weights if routing.by_token else routing.weights.unsqueeze(1)  # [N, 1 or S, K]
        if routing.experts is None:
            weights = weights[..., self._common]
        elif self._common is not None:
            named = routing.experts.unsqueeze(-1) == self._common  # [N, K, experts of the set]
            weights = (weights.unsqueeze(-1) * named.unsqueeze(1)).sum(-2)
        scaled = weights.index_select(-1, self._indices) * self._scales
        self._weights = None if learns else scaled
        return scaled
