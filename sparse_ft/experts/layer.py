"""The expert layer: a frozen linear plus the low-rank deltas of the experts in the routing.

    y = W x + sum over selected e of  w_e * (alpha_e / r_e) * B_e A_e x

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Shapes: N rows, S tokens a row, I inputs, O outputs, r rank, R
the sum of all ranks, C the columns (rank by rank) that one row uses, M the sets of experts: N, or 1 for all rows.

The matrices of all experts stand one after another in two banks, so one ``index_select`` from each bank fetches any
set of experts, whatever their number and ranks; bank.py holds the layout.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.experts.bank import BankLayout
from sparse_ft.experts.routing import Routing, RoutingSlot


class ExpertLayer(nn.Module):
    """A frozen linear with the LoRAs of all experts on it.

    Experts may differ in rank. An expert of rank 0 does not change this layer. Experts in training have
    ``nn.Parameter`` objects that are views into the banks; the others need none.

    Args:
        frozen: ``nn.Linear`` or transformers' ``Conv1D``.
        slot: Holds the routing of the running forward pass.
    """

    bank_a: Tensor
    """[R * I]: A transposed, [I, r], of one expert after another."""
    bank_b: Tensor
    """[1 + R, O]: the bias of the frozen linear, then B transposed, [r, O], of one expert after another."""
    folded_weight: Tensor | None
    """[O, I]: the frozen weight plus the delta of the expert ``folded``."""

    def __init__(self, frozen: nn.Module, *, slot: RoutingSlot) -> None:
        super().__init__()
        self.frozen = frozen
        self.slot = slot
        self.dropout = 0.0
        self.fan_in_fan_out = not isinstance(frozen, nn.Linear)
        self.out_features, self.in_features = linear_shape(frozen)
        self.layout = BankLayout.of((), ())
        self.folded: int | None = None
        """The expert whose delta ``folded_weight`` holds."""
        self.opened: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        weight = frozen.weight
        assert isinstance(weight, Tensor)
        bias = weight.new_zeros(self.out_features) if frozen.bias is None else frozen.bias
        assert isinstance(bias, Tensor)
        self.register_buffer("folded_weight", None, persistent=False)
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
            deltas: (A [r, I], B [O, r]) of each expert, or None for one that does not change this layer.
            scales: alpha / r of each expert.
        """
        pairs = [delta if delta is not None and delta[0].shape[0] else None for delta in deltas]
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        self.layout = BankLayout.of(self.ranks + ranks, self.scales + tuple(scales))
        piece = self.layout.piece  # rows of equal length: where all ranks are equal, nothing is copied twice
        a_parts = [pair[0].t().to(self.bank_a).reshape(-1, piece) for pair in pairs if pair is not None]
        b_parts = [pair[1].t().to(self.bank_b) for pair in pairs if pair is not None]
        if a_parts:
            self.bank_a = torch.cat([self.bank_a.view(-1, piece), *a_parts]).flatten()
            self.bank_b = torch.cat([self.bank_b, *b_parts])
        self._rebind()

    def fold(self, index: int) -> None:
        """Keep a second weight with the delta of one expert in it, so that the expert costs no time in prediction.

        Opening or removing the expert drops this weight.
        """
        if self.ranks[index]:
            lora_a, lora_b = (part.detach().double() for part in self._views(index))
            delta = (lora_a @ lora_b).t() * self.scales[index]
            self.folded_weight = (self._weight.t().double() + delta).to(self._weight.dtype).contiguous()
            self.folded = index

    def remove(self, index: int) -> None:
        """Remove one expert; the indices of those behind it fall by one."""
        self._unfold(index)
        if self.folded is not None:
            self.folded -= self.folded > index
        lora_a, lora_b = self.layout.slices(index, self.in_features)
        self.bank_a = torch.cat([self.bank_a[: lora_a.start], self.bank_a[lora_a.stop :]])
        self.bank_b = torch.cat([self.bank_b[: lora_b.start], self.bank_b[lora_b.stop :]])
        ranks, scales = self.ranks, self.scales
        self.layout = BankLayout.of(ranks[:index] + ranks[index + 1 :], scales[:index] + scales[index + 1 :])
        self.opened = {other - (other > index): pair for other, pair in self.opened.items() if other != index}
        self._rebind()

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views of (A [r, I], B [O, r]) of one expert."""
        lora_a, lora_b = self._views(index)
        return lora_a.t(), lora_b.t()

    def open(self, index: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A and B of one expert as parameters, transposed: [I, r] and [r, O]; they are views into the banks."""
        self._unfold(index)
        if index not in self.opened:
            lora_a, lora_b = self._pair(index)
            self.opened[index] = (nn.Parameter(lora_a), nn.Parameter(lora_b))
            self._register()
        return self.opened[index]

    def _rebind(self) -> None:
        """Make the parameters views into the present banks again."""
        for index, (lora_a, lora_b) in self.opened.items():
            lora_a.data, lora_b.data = self._views(index)
        self._register()

    def _register(self) -> None:
        """Register the parameters with ``nn.Module``, named by the order of the experts."""
        self.lora = nn.ParameterList(parameter for pair in self.opened.values() for parameter in pair)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rebind()  # the parameters of a deep copy have memory apart from its banks

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertLayer":
        super()._apply(fn, recurse)
        with torch.no_grad():
            for index, pair in self.opened.items():  # a moved parameter is no longer a view
                for view, parameter in zip(self._views(index), pair, strict=True):
                    view.copy_(parameter)
        self._rebind()
        return self

    def forward(self, x: Tensor) -> Tensor:  # [N, S, I] -> [N, S, O]
        """Apply the frozen linear and add the deltas of the running pass's routing."""
        routing = self.slot.read()
        if routing is None:
            return self.frozen(x)
        present = routing.present if routing.only is None else [routing.only]
        needed = tuple(index for index in (range(len(self.ranks)) if present is None else present) if self.ranks[index])
        if not needed:
            return self.frozen(x)
        drops = self.training and self.dropout > 0
        dropped = self.slot.dropout(x, self.dropout) if drops else x
        fused = torch.is_grad_enabled() and not drops and not torch.is_autocast_enabled(x.device.type)
        infers = not (drops or torch.is_grad_enabled())
        if routing.only is not None and not (infers and routing.only == self.folded):
            return self._with_expert(x, dropped, routing.only, fused=fused)
        runs = self.layout.runs(routing) if infers else None
        if runs is not None:
            return self._with_experts(x, runs)
        lora_a, lora_b, weights = (part.to(x.dtype) for part in self._matrices(routing, needed))
        if fused:
            return _MixedLinear.apply(x, self._weight, lora_a, lora_b, weights)
        return _mixed(x, dropped, self._weight, lora_a, lora_b, weights)[0]

    def _with_expert(self, x: Tensor, dropped: Tensor, index: int, *, fused: bool) -> Tensor:
        """Apply the frozen linear and one expert with weight 1 for all rows, with the same bits as PEFT: [N, S, O]."""
        lora_a, lora_b = (part.to(x.dtype) for part in self._pair(index))
        if fused:
            lora_b = torch.cat([lora_b, self.bank_b[:1].to(x.dtype)])
            scale = x.new_full((), self.scales[index])
            return _MixedLinear.apply(x, self._weight, lora_a.unsqueeze(0), lora_b.unsqueeze(0), scale)
        h = functional.linear(dropped, lora_a.t().contiguous())  # [N, S, r]; PEFT multiplies by a contiguous A, too
        return _added(self.frozen(x), h, lora_b, scale=self.scales[index])

    def _with_experts(self, x: Tensor, runs: Sequence[tuple[tuple[int, ...], slice]]) -> Tensor:
        """Apply the frozen linear, and to each run of rows its experts, as ``_with_expert`` does: [N, S, O]."""
        folded = [rows for together, rows in runs if self.folded in together]
        y: Tensor = self._folded_linear(x) if len(folded) == len(runs) else self.frozen(x)
        for rows in folded if len(folded) < len(runs) else ():
            y[rows] = self._folded_linear(x[rows])
        for together, rows in runs:
            for index in together:
                if index == self.folded:
                    continue
                lora_a, lora_b = (part.to(x.dtype) for part in self._pair(index))
                h = functional.linear(x[rows], lora_a.t().contiguous())  # [rows, S, r]
                y[rows] = _added(y[rows], h, lora_b, scale=self.scales[index])
        return y

    def _folded_linear(self, x: Tensor) -> Tensor:
        assert self.folded_weight is not None
        return functional.linear(x, self.folded_weight, self.bank_b[0])

    def _unfold(self, index: int) -> None:
        """Drop the folded weight if it holds this expert, which is about to be removed or trained."""
        if self.folded == index:
            self.folded, self.folded_weight = None, None

    @property
    def _weight(self) -> Tensor:
        """The frozen weight, [I, O]."""
        weight = self.frozen.weight
        assert isinstance(weight, Tensor)
        return weight if self.fan_in_fan_out else weight.t()

    def _views(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views into the banks of one expert's A [I, r] and B [r, O]."""
        lora_a, lora_b = self.layout.slices(index, self.in_features)
        return self.bank_a[lora_a].view(self.in_features, -1), self.bank_b[lora_b]

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return A [I, r] and B [r, O] of one expert: its parameters if it is in training."""
        return self.opened[index] if index in self.opened else self._views(index)

    def _matrices(self, routing: Routing, needed: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Fetch the matrices of the experts ``needed``; the cost does not grow with the experts of the model.

        Parameters in training are joined first, so that each receives its gradient.

        Returns:
            A [M, I, C], B with the frozen bias below it [M, C + 1, O], and the weights on their columns [N, 1 or S, C].
        """
        bank_a, bank_b, layout = self.bank_a, self.bank_b, self.layout
        if torch.is_grad_enabled() and any(p.requires_grad for index in needed for p in self.opened.get(index, ())):
            pairs = [self._pair(index) for index in needed]
            bank_a = torch.cat([lora_a.flatten() for lora_a, _ in pairs])
            bank_b = torch.cat([bank_b[:1], *(lora_b for _, lora_b in pairs)])
            layout = BankLayout.of(self.ranks, self.scales, needed)
        columns = layout.columns(routing, needed)
        lora_a = bank_a.view(-1, layout.piece).index_select(0, columns.pieces(self.in_features))
        lora_b = bank_b.index_select(0, columns.rows)
        return (
            lora_a.view(columns.sets, self.in_features, -1),
            lora_b.view(columns.sets, -1, self.out_features),
            columns.weights(routing),
        )


def _mixed(
    x: Tensor, dropped: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = x W + b + (weights * (dropped A)) B.

    The deltas are computed first, with the bias as their last column, and the large product is added to them in place;
    ``F.linear`` would first copy the bias to every row.

    Args:
        x: [N, S, I].
        dropped: ``x`` after dropout.
        weight: [I, O].
        lora_a: [M, I, C].
        lora_b: [M, C + 1, O].
        weights: Broadcast to [N, S, C].

    Returns:
        y [N, S, O]; h, the product with A [N, S, C]; and h times the weights, with a column of ones [N, S, C + 1].
    """
    h = _product(dropped, lora_a)
    weighted = functional.pad(h * weights, (0, 1), value=1.0)
    y = _product(weighted, lora_b)
    rows = y.view(-1, y.shape[-1])
    autocast = torch.is_autocast_enabled(x.device.type)
    add = torch.addmm if autocast else torch.Tensor.addmm_
    return add(rows, x.reshape(-1, x.shape[-1]), weight).view_as(y), h, weighted


def _product(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply [N, S, I] by [M, I, O]: by one matrix a row, or by one for all rows."""
    return x @ matrices[0] if len(matrices) == 1 else torch.bmm(x, matrices)


def _outer(left: Tensor, right: Tensor, *, sets: int) -> Tensor:
    """Return the gradient of ``_product``'s matrices, [M, I, O], from its input [N, S, I] and output's [N, S, O]."""
    if sets == 1:
        return (left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])).unsqueeze(0)
    return torch.bmm(left.transpose(1, 2), right)


class _MixedLinear(torch.autograd.Function):
    """``_mixed`` without dropout, with a backward pass that also adds to its large product in place.

    Equal to the plain formula up to rounding; a training step takes 12 % less time on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
        y, h, weighted = _mixed(x, x, weight, lora_a, lora_b, weights)
        ctx.save_for_backward(x, weight, lora_a, lora_b, weights, h, weighted)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, weights, h, weighted = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, needs_weights = ctx.needs_input_grad
        grad, sets = grads[0], len(lora_a)
        grad_weighted = _product(grad, lora_b[:, :-1].transpose(1, 2))  # [N, S, C]
        grad_h = grad_weighted * weights
        grad_x = None
        if needs_x:
            grad_x = _product(grad_h, lora_a.transpose(1, 2))
            grad_x.view(-1, x.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), weight.t())
        grad_a = _outer(x, grad_h, sets=sets) if needs_a else None
        grad_b = _outer(weighted, grad, sets=sets) if needs_b else None
        grad_weights = (grad_weighted * h).sum_to_size(weights.shape) if needs_weights else None
        return grad_x, None, grad_a, grad_b, grad_weights


def _added(y: Tensor, h: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """Return y + scale * h B, in the memory of ``y`` where that gives the same bits as PEFT's order of operations.

    Args:
        y: [N, S, O], output of a frozen linear, overwritten.
        h: [N, S, r].
        lora_b: [r, O].
        scale: Multiplied in before the product is rounded if it is a power of two, which changes no bit.
    """
    if torch.is_autocast_enabled(y.device.type) or abs(math.frexp(scale)[0]) != 0.5:
        return y + h @ lora_b * scale
    flat = y.view(-1, y.shape[-1])
    return flat.addmm_(h.reshape(-1, h.shape[-1]), lora_b, alpha=scale).view(y.shape)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of an ``nn.Linear``, or of a ``Conv1D``, whose weight is transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)
