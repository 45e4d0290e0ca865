"""The expert layer: a frozen linear plus the low-rank deltas of the experts that the routing chooses.

    y = W x + sum over chosen e of  w_e * (alpha_e / r_e) * B_e A_e x

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Shapes: N rows, S tokens a row, I inputs, O outputs, r rank, R
the sum of all ranks, C the columns (rank by rank) that one row uses.

The matrices of all experts stand below one another in two banks, A [R, I] and B [R, O], so that any choice of experts
is one ``index_select``, whatever their number and ranks.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.routing import Routing, RoutingSlot


class ExpertLayer(nn.Module):
    """A frozen linear with the LoRAs of all experts on it.

    Experts may differ in rank. A rank of 0 leaves this layer as the backbone has it. Experts in training own
    ``nn.Parameter`` objects that are views into the banks; the others need none.

    Args:
        frozen: ``nn.Linear`` or transformers' ``Conv1D``.
        slot: Where the routing of the running forward pass is read.
    """

    bank_a: Tensor
    bank_b: Tensor

    def __init__(self, frozen: nn.Module, *, slot: RoutingSlot) -> None:
        super().__init__()
        self.frozen = frozen
        self.slot = slot
        self.dropout = 0.0
        self.fan_in_fan_out = not isinstance(frozen, nn.Linear)
        self.out_features, self.in_features = linear_shape(frozen)
        self.layout = _Layout.of((), ())
        self.opened: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        weight = frozen.weight
        assert isinstance(weight, Tensor)
        self.register_buffer("bank_a", torch.zeros(0, self.in_features, device=weight.device), persistent=False)
        self.register_buffer("bank_b", torch.zeros(0, self.out_features, device=weight.device), persistent=False)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert in this layer."""
        return self.layout.ranks

    @property
    def scales(self) -> tuple[float, ...]:
        """Alpha / r of each expert."""
        return self.layout.scales

    def extend(self, deltas: Sequence[tuple[Tensor, Tensor] | None], *, scales: Sequence[float]) -> None:
        """Append experts.

        Args:
            deltas: (A [r, I], B [O, r]) of each, or None for one that leaves this layer as the backbone has it.
            scales: alpha / r of each.
        """
        pairs = [delta if delta is not None and delta[0].shape[0] else None for delta in deltas]
        a_parts = [pair[0].to(self.bank_a) for pair in pairs if pair is not None]
        b_parts = [pair[1].t().to(self.bank_b) for pair in pairs if pair is not None]
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        if a_parts:
            self.bank_a, self.bank_b = torch.cat([self.bank_a, *a_parts]), torch.cat([self.bank_b, *b_parts])
        self.layout = _Layout.of(self.ranks + ranks, self.scales + tuple(scales))
        self._rebind()

    def remove(self, index: int) -> None:
        """Take one expert out; those behind it move up by one."""
        rows = self.layout.rows_of(index)
        kept = [place for place in range(len(self.bank_a)) if place not in rows]
        self.bank_a, self.bank_b = self.bank_a[kept], self.bank_b[kept]
        ranks, scales = list(self.ranks), list(self.scales)
        del ranks[index], scales[index]
        self.layout = _Layout.of(tuple(ranks), tuple(scales))
        self.opened = {place - (place > index): pair for place, pair in self.opened.items() if place != index}
        self._rebind()

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views of (A [r, I], B [O, r]) of one expert."""
        rows = self.layout.rows_of(index)
        return self.bank_a[rows.start : rows.stop], self.bank_b[rows.start : rows.stop].t()

    def open(self, index: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return (A [r, I], B transposed [r, O]) of one expert as parameters; they are views into the banks."""
        if index not in self.opened:
            lora_a, lora_b = self._pair(index)
            self.opened[index] = (nn.Parameter(lora_a), nn.Parameter(lora_b))
            self._register()
        return self.opened[index]

    def _rebind(self) -> None:
        """Let the parameters be views into the present banks again."""
        for index, (lora_a, lora_b) in self.opened.items():
            rows = self.layout.rows_of(index)
            lora_a.data, lora_b.data = self.bank_a[rows.start : rows.stop], self.bank_b[rows.start : rows.stop]
        self._register()

    def _register(self) -> None:
        """Show the parameters to ``nn.Module``; the names follow the places of the experts."""
        self.lora = nn.ParameterList(parameter for pair in self.opened.values() for parameter in pair)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rebind()  # a deep copy has parameters of their own memory

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertLayer":
        super()._apply(fn, recurse)
        with torch.no_grad():
            for index, pair in self.opened.items():  # what was moved is no view any more
                rows = self.layout.rows_of(index)
                self.bank_a[rows.start : rows.stop], self.bank_b[rows.start : rows.stop] = pair
        self._rebind()
        return self

    def forward(self, x: Tensor) -> Tensor:  # [N, S, I] -> [N, S, O]
        """Apply the frozen linear and add the deltas that the routing of the running pass chooses."""
        routing = self.slot.read()
        if routing is None:
            return self.frozen(x)
        drops = self.training and self.dropout > 0
        only = routing.only
        if only is not None:
            if not self.ranks[only]:
                return self.frozen(x)
            bank_a, bank_b = self._pair(only)
            if torch.is_grad_enabled() and not drops and not torch.is_autocast_enabled(x.device.type):
                weight = self.frozen.weight
                assert isinstance(weight, Tensor)
                weight = weight if self.fan_in_fan_out else weight.t()
                lora_a, lora_b = bank_a.to(x.dtype), bank_b.to(x.dtype)
                return _LowRankLinear.apply(x, weight, self.frozen.bias, lora_a, lora_b, self.scales[only])
            h = functional.linear(self.slot.dropout(x, self.dropout) if drops else x, bank_a.to(x.dtype))  # [N, S, r]
            return _added(self.frozen(x), h, bank_b.to(x.dtype), scale=self.scales[only])
        y = self.frozen(x)
        present = routing.present
        if not any(self.ranks[index] for index in (range(len(self.ranks)) if present is None else present)):
            return y
        if drops:
            x = self.slot.dropout(x, self.dropout)
        return self._gathered(x, y, routing) if routing.experts is not None else self._dense(x, y, routing)

    def _banks(self, present: Sequence[int] | None) -> tuple[Tensor, Tensor, "_Layout"]:
        """Return banks that hold at least the experts ``present`` (None: all), and where each stands in them.

        Without gradients these are the banks of all experts, as they stand. With them, the parameters are joined, so
        that each receives its own.
        """
        indices = range(len(self.ranks)) if present is None else present
        needed = [index for index in indices if self.ranks[index]]
        trained = torch.is_grad_enabled() and any(
            parameter.requires_grad for index in needed for parameter in self.opened.get(index, ())
        )
        if not trained:
            return self.bank_a, self.bank_b, self.layout
        pairs = [self._pair(index) for index in needed]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]), self.layout.packed(tuple(needed))

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (A [r, I], B transposed [r, O]) of one expert: its parameters if it has some."""
        if index in self.opened:
            return self.opened[index]
        rows = self.layout.rows_of(index)
        return self.bank_a[rows.start : rows.stop], self.bank_b[rows.start : rows.stop]

    def _gathered(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Fetch the matrices of each row's experts and multiply row by row; the cost does not grow with the experts."""
        assert routing.experts is not None
        present = routing.present or []
        # Padded to the largest rank present, not of all experts: an expert outside the batch changes nothing in it.
        width = max(self.ranks[index] for index in present)
        bank_a, bank_b, layout = self._banks(present)
        columns, gate = layout.columns(routing.experts, width)  # [N, K * width] both
        weights = routing.weights.repeat_interleave(width, -1)  # [N, C] or [N, S, C]
        gate = weights * (gate.unsqueeze(1) if routing.by_token else gate)
        gate = gate if routing.by_token else gate.unsqueeze(1)  # [N, 1 or S, C]
        rows, chosen = columns.shape
        lora_a = bank_a.index_select(0, columns.flatten()).view(rows, chosen, -1).to(x.dtype)  # [N, C, I]
        lora_b = bank_b.index_select(0, columns.flatten()).view(rows, chosen, -1).to(x.dtype)  # [N, C, O]
        h = torch.bmm(x, lora_a.transpose(1, 2)) * gate.to(x.dtype)  # [N, S, C]
        if torch.is_autocast_enabled(x.device.type):
            return torch.baddbmm(y, h, lora_b)
        return y.baddbmm_(h, lora_b)  # y is the fresh output of the frozen linear, and nobody's but ours

    def _dense(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Multiply by the matrices of all experts at once; the weights scale the columns."""
        bank_a, bank_b, layout = self._banks(None)
        gate = layout.spread(routing.weights)  # [N, R] or [N, S, R]
        gate = gate if routing.by_token else gate.unsqueeze(1)
        h = functional.linear(x, bank_a.to(x.dtype)) * gate.to(x.dtype)  # [N, S, R]
        return _added(y, h, bank_b.to(x.dtype), scale=1.0)


def _added(y: Tensor, h: Tensor, bank_b: Tensor, *, scale: float) -> Tensor:
    """Return y + scale * h B, in the memory of ``y`` where that changes no bit of what PEFT computes.

    Args:
        y: [N, S, O], the fresh output of a frozen linear.
        h: [N, S, r].
        bank_b: [r, O].
        scale: Of the product; only a power of two may be multiplied in before the product is rounded.
    """
    if torch.is_autocast_enabled(y.device.type) or abs(math.frexp(scale)[0]) != 0.5:
        return y + h @ bank_b * scale
    flat = y.view(-1, y.shape[-1])
    return flat.addmm_(h.reshape(-1, h.shape[-1]), bank_b, alpha=scale).view(y.shape)


class _Layout:
    """Where each expert stands in the banks; made once per combination of ranks and scales."""

    def __init__(self, ranks: tuple[int, ...], scales: tuple[float, ...], starts: tuple[int, ...]) -> None:
        self.ranks, self.scales, self.starts = ranks, scales, starts
        self._packed: dict[tuple[int, ...], _Layout] = {}
        self._tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._last: tuple[Any, ...] | None = None

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

    def rows_of(self, index: int) -> range:
        """Return the rows of the banks that belong to an expert."""
        return range(self.starts[index], self.starts[index] + self.ranks[index])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return starts, ranks and scales, each [E]."""
        if device not in self._tensors:
            self._tensors[device] = (
                torch.tensor(self.starts, device=device),
                torch.tensor(self.ranks, device=device),
                torch.tensor(self.scales, device=device, dtype=torch.float32),
            )
        return self._tensors[device]

    def columns(self, experts: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Name the bank rows of each row's experts.

        Args:
            experts: [N, K].
            width: Columns to give each expert; those beyond its rank have scale 0.

        Returns:
            Bank rows and the scales on them, both [N, K * width]. All layers of one layout ask for the same, one after
            another, so the last answer is kept.
        """
        last = self._last
        if last is not None and last[0] is experts and last[1] == width:
            return last[2], last[3]
        starts, ranks, scales = self.tensors(experts.device)
        steps = torch.arange(width, device=experts.device)
        chosen = experts.flatten()
        real = steps < ranks[chosen].unsqueeze(1)  # [N * K, width]
        rows = torch.where(real, starts[chosen].unsqueeze(1) + steps, 0).view(len(experts), -1)
        gate = torch.where(real, scales[chosen].unsqueeze(1), 0.0).view(len(experts), -1)
        self._last = (experts, width, rows, gate)
        return rows, gate

    def spread(self, weights: Tensor) -> Tensor:
        """Repeat each expert's weight [..., E] over its columns, times its scale: [..., R]."""
        _, ranks, scales = self.tensors(weights.device)
        return (weights * scales).repeat_interleave(ranks, -1, output_size=sum(self.ranks))


class _LowRankLinear(torch.autograd.Function):
    """y = x W + b + s (x A') B for one expert, adding into the large products in place of building temporaries.

    The same numbers as the plain formula up to rounding; a training step takes 12 % less time on a CPU.
    Shapes: x [..., I], weight [I, O], bias [O] or None, lora_a [r, I], lora_b [r, O].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [T, I]
        scaled_b = lora_b * scale
        h = rows @ lora_a.t()  # [T, r]
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)  # [T, O]
        y.addmm_(h, scaled_b)
        ctx.save_for_backward(rows, weight, lora_a, scaled_b, h)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, lora_a, scaled_b, h = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])  # [T, O]
        grad_h = grad @ scaled_b.t()  # [T, r]
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = (grad @ weight.t()).addmm_(grad_h, lora_a).view(ctx.shape) if needs_x else None
        grad_a = grad_h.t() @ rows if needs_a else None
        grad_b = (h.t() @ grad).mul_(ctx.scale) if needs_b else None
        return grad_x, None, None, grad_a, grad_b, None


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of an ``nn.Linear``, or of a ``Conv1D``, which keeps its weight transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)
