"""The expert layer: a frozen linear plus the low-rank deltas of the experts that the routing chooses.

    y = W x + sum over chosen e of  w_e * (alpha_e / r_e) * B_e A_e x

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Shapes: N rows, S tokens a row, I inputs, O outputs, r rank, R
the sum of all ranks, C the columns (rank by rank) that one row uses, M the sets of experts: N, or 1 for all rows.

The matrices of all experts stand one after another in two banks, so that any choice of experts is one
``index_select`` from each, whatever their number and ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.experts.bank import _Layout
from sparse_ft.experts.routing import Routing, RoutingSlot


class ExpertLayer(nn.Module):
    """A frozen linear with the LoRAs of all experts on it.

    Experts may differ in rank. A rank of 0 leaves this layer as the backbone has it. Experts in training own
    ``nn.Parameter`` objects that are views into the banks; the others need none.

    Args:
        frozen: ``nn.Linear`` or transformers' ``Conv1D``.
        slot: Where the routing of the running forward pass is read.
    """

    bank_a: Tensor
    """[R * I]: A transposed, [I, r], of one expert after another."""
    bank_b: Tensor
    """[1 + R, O]: the bias of the frozen linear, then B transposed, [r, O], of one expert after another."""

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
        bias = weight.new_zeros(self.out_features) if frozen.bias is None else frozen.bias
        assert isinstance(bias, Tensor)
        self.register_buffer("bank_a", torch.zeros(0, device=weight.device), persistent=False)
        self.register_buffer("bank_b", bias.detach().to(torch.float32, copy=True).unsqueeze(0), persistent=False)

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
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        self.layout = _Layout.of(self.ranks + ranks, self.scales + tuple(scales))
        piece = self.layout.piece  # where all ranks are equal, nothing is copied twice
        a_parts = [pair[0].t().to(self.bank_a).reshape(-1, piece) for pair in pairs if pair is not None]
        b_parts = [pair[1].t().to(self.bank_b) for pair in pairs if pair is not None]
        if a_parts:
            self.bank_a = torch.cat([self.bank_a.view(-1, piece), *a_parts]).flatten()
            self.bank_b = torch.cat([self.bank_b, *b_parts])
        self._rebind()

    def remove(self, index: int) -> None:
        """Take one expert out; those behind it move up by one."""
        lora_a, lora_b = self.layout.places(index, self.in_features)
        self.bank_a = torch.cat([self.bank_a[: lora_a.start], self.bank_a[lora_a.stop :]])
        self.bank_b = torch.cat([self.bank_b[: lora_b.start], self.bank_b[lora_b.stop :]])
        ranks, scales = list(self.ranks), list(self.scales)
        del ranks[index], scales[index]
        self.layout = _Layout.of(tuple(ranks), tuple(scales))
        self.opened = {place - (place > index): pair for place, pair in self.opened.items() if place != index}
        self._rebind()

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views of (A [r, I], B [O, r]) of one expert."""
        lora_a, lora_b = self._views(index)
        return lora_a.t(), lora_b.t()

    def open(self, index: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A and B of one expert as parameters, transposed: [I, r] and [r, O]; they are views into the banks."""
        if index not in self.opened:
            lora_a, lora_b = self._pair(index)
            self.opened[index] = (nn.Parameter(lora_a), nn.Parameter(lora_b))
            self._register()
        return self.opened[index]

    def _rebind(self) -> None:
        """Let the parameters be views into the present banks again."""
        for index, (lora_a, lora_b) in self.opened.items():
            lora_a.data, lora_b.data = self._views(index)
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
                for view, parameter in zip(self._views(index), pair, strict=True):
                    view.copy_(parameter)
        self._rebind()
        return self

    def forward(self, x: Tensor) -> Tensor:  # [N, S, I] -> [N, S, O]
        """Apply the frozen linear and add the deltas that the routing of the running pass chooses."""
        routing = self.slot.read()
        if routing is None:
            return self.frozen(x)
        drops = self.training and self.dropout > 0
        learns = torch.is_grad_enabled() and not drops and not torch.is_autocast_enabled(x.device.type)
        only = routing.only
        if only is not None:
            if not self.ranks[only]:
                return self.frozen(x)
            lora_a, lora_b = (part.to(x.dtype) for part in self._pair(only))
            if learns:
                lora_b = torch.cat([lora_b, self.bank_b[:1].to(x.dtype)])
                scale = x.new_full((), self.scales[only])
                return _MixedLinear.apply(x, self._weight, lora_a.unsqueeze(0), lora_b.unsqueeze(0), scale)
            dropped = self.slot.dropout(x, self.dropout) if drops else x
            h = functional.linear(dropped, lora_a.t().contiguous())  # [N, S, r], of PEFT's matrix for PEFT's very bits
            return _added(self.frozen(x), h, lora_b, scale=self.scales[only])
        present = range(len(self.ranks)) if routing.present is None else routing.present
        needed = tuple(index for index in present if self.ranks[index])
        if not needed:
            return self.frozen(x)
        lora_a, lora_b, gate = (part.to(x.dtype) for part in self._matrices(routing, needed))
        if learns:
            return _MixedLinear.apply(x, self._weight, lora_a, lora_b, gate)
        dropped = self.slot.dropout(x, self.dropout) if drops else x
        return _mixed(x, dropped, self._weight, lora_a, lora_b, gate)[0]

    @property
    def _weight(self) -> Tensor:
        """The frozen weight, [I, O]."""
        weight = self.frozen.weight
        assert isinstance(weight, Tensor)
        return weight if self.fan_in_fan_out else weight.t()

    def _views(self, index: int) -> tuple[Tensor, Tensor]:
        """Return A and B of one expert as they stand in the banks, [I, r] and [r, O]."""
        lora_a, lora_b = self.layout.places(index, self.in_features)
        return self.bank_a[lora_a].view(self.in_features, -1), self.bank_b[lora_b]

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return A [I, r] and B [r, O] of one expert: its parameters if it has some."""
        return self.opened[index] if index in self.opened else self._views(index)

    def _matrices(self, routing: Routing, needed: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Fetch the matrices of the experts that rows use; the cost does not grow with the experts of the model.

        Parameters in training are joined first, so that each receives its own gradient.

        Args:
            routing: Of the rows.
            needed: The experts that it names and that have a rank in this layer.

        Returns:
            A [M, I, C], B with the frozen bias below it [M, C + 1, O], and the weights on their columns [N, 1 or S, C].
        """
        bank_a, bank_b, layout = self.bank_a, self.bank_b, self.layout
        if torch.is_grad_enabled() and any(p.requires_grad for index in needed for p in self.opened.get(index, ())):
            pairs = [self._pair(index) for index in needed]
            bank_a = torch.cat([lora_a.flatten() for lora_a, _ in pairs])
            bank_b = torch.cat([bank_b[:1], *(lora_b for _, lora_b in pairs)])
            layout = layout.packed(needed)
        columns = layout.columns(routing, needed)
        lora_a = bank_a.view(-1, layout.piece).index_select(0, columns.pieces(self.in_features))
        lora_b = bank_b.index_select(0, columns.rows)
        gate = columns.gate(routing)
        return (
            lora_a.view(columns.sets, self.in_features, -1),
            lora_b.view(columns.sets, -1, self.out_features),
            gate,
        )


def _mixed(
    x: Tensor, dropped: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = x W + b + (gate * (dropped A)) B.

    The deltas come first, with the bias as their last column: the large product is then added to them in place, where
    ``F.linear`` would first copy the bias to every row.

    Args:
        x: [N, S, I].
        dropped: The same after dropout.
        weight: [I, O].
        lora_a: [M, I, C].
        lora_b: [M, C + 1, O].
        gate: Broadcast to [N, S, C].

    Returns:
        y [N, S, O], the product with A [N, S, C], and that times the gate, with a column of ones [N, S, C + 1].
    """
    h = _product(dropped, lora_a)
    gated = functional.pad(h * gate, (0, 1), value=1.0)
    y = _product(gated, lora_b)
    rows = y.view(-1, y.shape[-1])
    autocast = torch.is_autocast_enabled(x.device.type)
    add = torch.addmm if autocast else torch.Tensor.addmm_
    return add(rows, x.reshape(-1, x.shape[-1]), weight).view_as(y), h, gated


def _product(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply [N, S, I] by [M, I, O]: by a matrix for each row, or by one for all."""
    return x @ matrices[0] if len(matrices) == 1 else torch.bmm(x, matrices)


def _outer(left: Tensor, right: Tensor, *, sets: int) -> Tensor:
    """Return what ``_product`` gives to its matrices as gradient: [M, I, O] of [N, S, I] and [N, S, O]."""
    if sets == 1:
        return (left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])).unsqueeze(0)
    return torch.bmm(left.transpose(1, 2), right)


class _MixedLinear(torch.autograd.Function):
    """``_mixed`` without dropout, adding into the large products of the backward pass too.

    The same numbers as the plain formula up to rounding; a training step takes 12 % less time on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
        y, h, gated = _mixed(x, x, weight, lora_a, lora_b, gate)
        ctx.save_for_backward(x, weight, lora_a, lora_b, gate, h, gated)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, gate, h, gated = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, needs_gate = ctx.needs_input_grad
        grad, sets = grads[0], len(lora_a)
        grad_gated = _product(grad, lora_b[:, :-1].transpose(1, 2))  # [N, S, C]
        grad_h = grad_gated * gate
        grad_x = None
        if needs_x:
            grad_x = _product(grad_h, lora_a.transpose(1, 2))
            grad_x.view(-1, x.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), weight.t())
        grad_a = _outer(x, grad_h, sets=sets) if needs_a else None
        grad_b = _outer(gated, grad, sets=sets) if needs_b else None
        grad_gate = (grad_gated * h).sum_to_size(gate.shape) if needs_gate else None
        return grad_x, None, grad_a, grad_b, grad_gate


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


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of an ``nn.Linear``, or of a ``Conv1D``, which keeps its weight transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)
