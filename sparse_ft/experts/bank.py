"""How the LoRAs of many experts lie in one tensor."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.experts.routing import Routing

_FEW = 2
"""Times the experts a row uses: up to so many experts in a batch, all rows are multiplied by all of them."""


class _Layout:
    """Where each expert stands in the banks; made once per combination of ranks and scales."""

    def __init__(self, ranks: tuple[int, ...], scales: tuple[float, ...], starts: tuple[int, ...]) -> None:
        self.ranks, self.scales, self.starts = ranks, scales, starts
        self.piece = math.gcd(*ranks) or 1
        """Columns of A that always stand side by side."""
        self._packed: dict[tuple[int, ...], _Layout] = {}
        self._tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @staticmethod
    @lru_cache(maxsize=256)
    def of(ranks: tuple[int, ...], scales: tuple[float, ...]) -> "_Layout":
        """Return the layout of experts that stand one after another."""
        starts, total = [], 0
        for rank in ranks:
            starts.append(total)
            total += rank
        return _Layout(ranks, scales, tuple(starts))

    def packed(self, needed: tuple[int, ...]) -> "_Layout":
        """Return the layout of banks that hold only the experts ``needed``; indices stay those of all experts."""
        if needed not in self._packed:
            if len(self._packed) > 64:
                self._packed.clear()
            starts, total = [0] * len(self.ranks), 0
            for index in needed:
                starts[index] = total
                total += self.ranks[index]
            self._packed[needed] = _Layout(self.ranks, self.scales, tuple(starts))
        return self._packed[needed]

    def places(self, index: int, in_features: int) -> tuple[slice, slice]:
        """Return where an expert's A and B stand in the banks."""
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

    def columns(self, routing: Routing, needed: tuple[int, ...]) -> "_Columns":
        """Find the columns of a routing's experts; layers of one layout share the answer.

        Args:
            routing: Of the rows.
            needed: The experts that it names and that have a rank here.
        """
        found: _Columns | None = routing.kept.get(self)
        if found is None:
            found = routing.kept[self] = _Columns(self, routing, needed)
        return found


class _Columns:
    """Where the columns of the experts that a routing names stand in the banks, as M sets.

    Args:
        layout: Of the banks.
        routing: Of the rows.
        needed: The experts that it names and that have a rank in the layout.
    """

    def __init__(self, layout: _Layout, routing: Routing, needed: tuple[int, ...]) -> None:
        device = routing.weights.device
        starts, ranks, scales = layout.tensors(device)
        experts, self._together = routing.experts, None
        if experts is None or len(needed) <= _FEW * experts.shape[1]:
            self._together = torch.tensor(needed, device=device)
            experts = self._together.unsqueeze(0)
        self.sets, chosen = experts.shape
        # As wide as the largest rank present, not of all experts: an expert outside the batch changes nothing in it.
        width = max(layout.ranks[index] for index in needed)
        owners = experts.repeat_interleave(width, -1)  # [M, C]
        places = torch.arange(chosen, device=device).repeat_interleave(width)
        steps = torch.arange(width, device=device).repeat(chosen)
        real = steps < ranks[owners]
        if self._together is not None:  # all rows use the same columns, so none is padding
            owners, places, steps = owners[real].unsqueeze(0), places[real[0]], steps[real[0]]
            real = torch.ones_like(owners, dtype=torch.bool)
        self._places = places
        self._scales = torch.where(real, scales[owners], 0.0).unsqueeze(1)  # [M, 1, C]
        starts, ranks, steps = starts[owners] * real, ranks[owners] * real, steps * real
        self.rows = functional.pad(1 + starts + steps, (0, 1)).flatten()
        """In the bank of B, [M * (C + 1)]; the last of each set is the bias."""
        self._first, self._step, self._rank = (
            part[:, :: layout.piece].unsqueeze(1) // layout.piece for part in (starts, steps, ranks)
        )
        self._pieces: dict[int, Tensor] = {}
        self._gate: Tensor | None = None

    def pieces(self, in_features: int) -> Tensor:
        """Return the places of the pieces of A in their bank, [M * I * C / piece]."""
        if in_features not in self._pieces:
            lines = torch.arange(in_features, device=self._rank.device).view(1, -1, 1)
            self._pieces[in_features] = (self._first * in_features + self._step + lines * self._rank).flatten()
        return self._pieces[in_features]

    def gate(self, routing: Routing) -> Tensor:
        """Return the weights on the columns, times the scales of their experts: [N, 1 or S, C]."""
        learns = torch.is_grad_enabled() and routing.weights.requires_grad
        if self._gate is not None and not learns:
            return self._gate
        weights = routing.weights if routing.by_token else routing.weights.unsqueeze(1)  # [N, 1 or S, K]
        if routing.experts is None:
            weights = weights[..., self._together]
        elif self._together is not None:
            named = routing.experts.unsqueeze(-1) == self._together  # [N, K, M]
            weights = (weights.unsqueeze(-1) * named.unsqueeze(1)).sum(-2)
        gate = weights.index_select(-1, self._places) * self._scales
        self._gate = None if learns else gate
        return gate
