"""Which experts serve a row or a token, with which weights, and how the layers read it.

Shapes: N rows, S tokens a row, E experts of the model, K experts selected per row.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of each row and their weights; a weight may differ from token to token.

    Only the experts named here are computed. A row whose weights are all 0 goes through the bare backbone.
    """

    experts: Tensor | None
    """[N, K] indices, int64; None: ``weights`` has a column for every expert of the model."""
    weights: Tensor
    """[N, K] per row or [N, S, K] per token, float32."""
    logits: Tensor | None = None
    """Logits of the gate's experts, [N, E] or [N, S, E], float32; None if no learned gate decided."""
    confidence: Tensor | None = None
    """[N] or [N, S], 0 to 1; where it was too low all weights are 0."""
    dropped: Tensor | None = None
    """[N] or [N, S], number of selected experts that were full; None without a capacity."""
    candidates: tuple[int, ...] | None = None
    """The experts that may have a weight where ``experts`` is None; None: every expert of the model."""

    @classmethod
    def one_hot(cls, experts: Sequence[int], *, device: torch.device | str = "cpu") -> "Routing":
        """Route each row to one known expert.

        Args:
            experts: Index of each row's expert, (N,).
            device: Device of the hidden states.
        """
        indices = torch.tensor(list(experts), dtype=torch.long, device=device).unsqueeze(1)
        routing = cls(indices, torch.ones(indices.shape, device=device))
        routing.__dict__["only"] = experts[0] if len(set(experts)) == 1 else None  # spares reading the tensor back
        return routing

    @classmethod
    def stacked(cls, parts: Sequence["Routing"], *, num_experts: int) -> "Routing":
        """Return the routings of several sets of rows as one; what gates know besides the weights is left out.

        Args:
            parts: Per row, among all experts of the model.
            num_experts: E of the model.
        """
        if len(parts) == 1:
            return parts[0]
        if any(part.experts is None for part in parts):
            return cls(None, torch.cat([part.dense_weights(num_experts) for part in parts]))
        width = max(part.weights.shape[1] for part in parts)
        indices = [functional.pad(part.experts, (0, width - part.weights.shape[1])) for part in parts]  # type: ignore[arg-type]
        weights = [functional.pad(part.weights, (0, width - part.weights.shape[1])) for part in parts]
        return cls(torch.cat(indices), torch.cat(weights))

    @property
    def by_token(self) -> bool:
        """Whether the weights differ from token to token."""
        return self.weights.dim() == 3

    @cached_property
    def only(self) -> int | None:
        """The expert that serves every row alone with weight 1, if there is one."""
        if self.experts is None or self.by_token or self.experts.shape[1] != 1 or not len(self.experts):
            return None
        first = int(self.experts[0, 0])
        if bool((self.experts == first).all()) and bool((self.weights == 1).all()):
            return first
        return None

    def runs(self, ranks: Sequence[int]) -> list[tuple[tuple[int, ...], slice]] | None:
        """Return runs of neighbouring rows in which each row uses the same experts with weight 1.

        Args:
            ranks: Rank of every expert in the layer; an expert of rank 0 does not serve it.

        Returns:
            Experts (none: the bare layer) and rows of each run; None if an expert has another weight, or tokens differ.
        """
        if self.experts is None or self.by_token:
            return None
        runs: list[tuple[tuple[int, ...], slice]] = []
        for row, (experts, weights) in enumerate(zip(self.experts.tolist(), self.weights.tolist(), strict=True)):
            serving = [
                (index, weight) for index, weight in zip(experts, weights, strict=True) if weight and ranks[index]
            ]
            if any(weight != 1 for _, weight in serving):
                return None
            together = tuple(index for index, _ in serving)
            start = runs.pop()[1].start if runs and runs[-1][0] == together else row
            runs.append((together, slice(start, row + 1)))
        return runs

    @cached_property
    def present(self) -> list[int] | None:
        """The experts that may serve a row, in ascending order; None if every expert of the model may."""
        named = self.candidates if self.experts is None else self.experts.flatten().tolist()
        return None if named is None else sorted(set(named))

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """Results that depend on this routing only and that several layers use."""
        return {}

    def _named(self, expert: int) -> Tensor:
        """Return where rows name an expert, [N, K], or [N, 1, K] for weights per token."""
        assert self.experts is not None
        named = self.experts == expert
        return named.unsqueeze(1) if self.by_token else named

    def weights_of(self, expert: int) -> Tensor:
        """Return the weight of one expert, [N, 1] per row or [N, S] per token; 0 where it is not selected."""
        weights = self.weights[..., expert] if self.experts is None else (self.weights * self._named(expert)).sum(-1)
        return weights if self.by_token else weights.unsqueeze(-1)

    def dense_weights(self, num_experts: int) -> Tensor:
        """Return the weight of every expert of the model: [N, E] per row or [N, S, E] per token."""
        if self.experts is None:
            return self.weights
        experts = self.experts.unsqueeze(1).expand_as(self.weights) if self.by_token else self.experts
        zeros = self.weights.new_zeros(*self.weights.shape[:-1], num_experts)
        return zeros.scatter_add(-1, experts, self.weights)

    def reindexed(self, indices: Sequence[int], *, num_experts: int) -> "Routing":
        """Return this routing among a gate's G experts as a routing among all experts of the model.

        Args:
            indices: Index in the model of each of the gate's experts, (G,).
            num_experts: E of the model; ``logits`` stay those of the G experts.
        """
        if list(indices) == list(range(num_experts)):
            return self
        in_model = torch.tensor(list(indices), device=self.weights.device)
        if self.experts is not None:
            return replace(self, experts=in_model[self.experts])
        every = self.weights.new_zeros(*self.weights.shape[:-1], num_experts)
        return replace(self, weights=every.index_copy(-1, in_model, self.weights), candidates=tuple(indices))

    def with_expert(self, expert: int, rows: Tensor) -> "Routing":
        """Return this routing with one expert in some rows at a weight of 1, in addition to the selected ones.

        Args:
            expert: Its index.
            rows: [N], 1 for rows that use it, else 0.
        """
        added = rows.to(self.weights).view(-1, *[1] * (self.weights.dim() - 1))  # [N, 1] or [N, 1, 1]
        if self.experts is None:
            named = torch.arange(self.weights.shape[-1], device=self.weights.device) == expert
            candidates = None if self.candidates is None else (*self.candidates, expert)
            return replace(self, weights=torch.where(named & (added > 0), 1.0, self.weights), candidates=candidates)
        weights = torch.where(self._named(expert) & (added > 0), 0.0, self.weights)
        experts = torch.cat([self.experts, torch.full_like(self.experts[:, :1], expert)], -1)
        return replace(self, experts=experts, weights=torch.cat([weights, added.expand_as(weights[..., :1])], -1))

    def segments(self, *, single_rows: bool = False) -> list[slice]:
        """Cut the rows into runs of neighbours that one expert serves alone; any other row is a segment by itself."""
        if single_rows or self.experts is None or self.by_token or self.experts.shape[1] != 1:
            return [slice(row, row + 1) for row in range(len(self.weights))]
        segments: list[slice] = []
        before = None
        for row, served in enumerate(zip(self.experts[:, 0].tolist(), self.weights[:, 0].tolist(), strict=True)):
            start = segments.pop().start if served == before and served[1] == 1 else row
            segments.append(slice(start, row + 1))
            before = served
        return segments

    def take(self, rows: Sequence[int] | slice) -> "Routing":
        """Return the routing of some rows."""
        if rows == slice(None):
            return self
        selected = rows if isinstance(rows, slice) else list(rows)
        taken = replace(
            self,
            experts=None if self.experts is None else self.experts[selected],
            weights=self.weights[selected],
            logits=None if self.logits is None else self.logits[selected],
            confidence=None if self.confidence is None else self.confidence[selected],
            dropped=None if self.dropped is None else self.dropped[selected],
        )
        if self.__dict__.get("only") is not None and len(taken.weights):
            taken.__dict__["only"] = self.only  # spares reading the tensor back
        return taken


@dataclass(frozen=True)
class Split:
    """A block before which rows with different experts separate, so that their number rises to U; see plan.py."""

    parents: Tensor
    """[U], the row that each continues."""
    bases: Tensor
    """[U], the row that each began as."""
    rows: Tensor
    """[U], a row of the batch that each stands for."""
    routing: Routing
    """Routing of the U rows."""


@dataclass
class ForwardPass:
    """State of a running forward pass that layers and blocks read."""

    routing: Routing | None
    """Experts of the rows; None leaves all layers as the backbone has them."""
    rows: slice | Tensor = field(default_factory=lambda: slice(None))
    """The rows of the batch that run."""
    splits: dict[int, Split] = field(default_factory=dict)
    """Block to the parting of rows before it."""
    split: Split | None = None
    """The last split that the pass has reached."""
    num_bases: int = 0
    """Rows with which the pass began."""
    changes: dict[int, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    """Block to functions that are applied in order to the hidden states [N, S, H] that enter it."""
    trunk: Tensor | None = None
    """[N, S, H] that enter ``first_block``; the blocks below return it and compute nothing."""
    first_block: int = 0
    """0-based block that ``trunk`` enters."""
    generator: torch.Generator | None = None
    """Source of dropout's random numbers; None takes the global one."""

    @property
    def present(self) -> list[int] | None:
        """The experts that may serve a row now or above; None if every expert of the model may."""
        routings = [self.routing, *(split.routing for split in self.splits.values())]
        named = [None if routing is None else routing.present for routing in routings]
        return None if None in named else sorted({index for present in named for index in present or ()})


class RoutingSlot:
    """Hands the state of a forward pass to layers and blocks, because transformers' blocks pass no extra arguments on.

    Every thread has its own state, so several threads may run the same model, each one forward pass at a time.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def running(self) -> ForwardPass | None:
        """The pass that runs in this thread, if one does."""
        running: ForwardPass | None = getattr(self._local, "running", None)
        return running

    @contextlib.contextmanager
    def filled(self, routing: Routing | ForwardPass) -> Iterator[ForwardPass]:
        """Hold a routing, or the whole state of a pass, while it runs."""
        if self.running is not None:
            raise RuntimeError("This model is already in a forward pass in this thread; one cannot start another.")
        running = routing if isinstance(routing, ForwardPass) else ForwardPass(routing)
        self._local.running = running
        try:
            yield running
        finally:
            self._local.running = None

    def read(self) -> Routing | None:
        """Return the routing of the running forward pass, None for the bare backbone."""
        if self.running is None:
            raise RuntimeError("An expert layer was called outside SparseExpertModel.forward: no routing is set.")
        return self.running.routing

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Apply dropout to a tensor with the running pass's generator."""
        generator = None if self.running is None else self.running.generator
        if generator is None:
            return functional.dropout(x, probability)
        remaining = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
        return x * remaining.div_(1 - probability)

    def listen(self, blocks: Iterable[nn.Module]) -> None:
        """Make the blocks of a backbone apply the running pass's changes to their input, and its cached trunk."""
        for index, block in enumerate(blocks):
            block.forward = functools.partial(self._run_block, index, block.forward)

    def _run_block(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self.running
        if running is None:
            return forward(*args, **kwargs)
        if running.trunk is not None and index < running.first_block:
            return running.trunk
        if index in running.splits or running.split is not None:
            args, kwargs = _parted(running, index, args, kwargs)
        for change in running.changes.get(index, ()):
            if args:
                args = (change(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = change(kwargs["hidden_states"])
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingSlot":
        return RoutingSlot()


def _parted(
    running: ForwardPass, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block after the rows have parted; masks and positions are still those of the lowest."""
    hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
    if index in running.splits:
        split = running.split = running.splits[index]
        running.rows, running.routing = split.rows, split.routing
        hidden = hidden.index_select(0, split.parents)
    assert running.split is not None
    bases, count = running.split.bases, running.num_bases
    kwargs = {name: _of_rows(value, bases, count) for name, value in kwargs.items() if name != "hidden_states"}
    return (hidden, *(_of_rows(value, bases, count) for value in rest)), kwargs


def _of_rows(value: Any, bases: Tensor, count: int) -> Any:
    """Select rows of what a block reads beside its hidden states: tensors with a first dimension of ``count`` rows."""
    if isinstance(value, tuple):
        return tuple(_of_rows(entry, bases, count) for entry in value)
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == count:
        return value.index_select(0, bases)
    return value
