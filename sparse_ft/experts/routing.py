"""Which experts serve a row or a token, with which weights, and how the layers learn of it.

Shapes: N rows, S tokens a row, E experts of the model, K experts chosen per row.
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
    """[N, K] indices, int64; None: every expert of the model, in their order."""
    weights: Tensor
    """[N, K] per row or [N, S, K] per token, float32."""
    logits: Tensor | None = None
    """What the gate said of every expert, [N, E] or [N, S, E], float32; None if it was not learned."""
    confidence: Tensor | None = None
    """[N] or [N, S], 0 to 1; where it was too low all weights are 0."""
    dropped: Tensor | None = None
    """[N] or [N, S], the choices that were lost because an expert was full; None without a capacity."""

    @classmethod
    def one_hot(cls, experts: Sequence[int], *, device: torch.device | str = "cpu") -> "Routing":
        """Route each row to one known expert.

        Args:
            experts: Index of each row's expert, (N,).
            device: Of the hidden states.
        """
        indices = torch.tensor(list(experts), dtype=torch.long, device=device).unsqueeze(1)
        routing = cls(indices, torch.ones(indices.shape, device=device))
        routing.__dict__["only"] = experts[0] if len(set(experts)) == 1 else None  # known without asking a tensor
        return routing

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

    @cached_property
    def present(self) -> list[int] | None:
        """The experts that any row names, in order; None if that is all of the model."""
        return None if self.experts is None else sorted(set(self.experts.flatten().tolist()))

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What one layer made of this routing and others can use again."""
        return {}

    def weights_of(self, index: int) -> Tensor:
        """Return the weight of one expert, [N, 1] per row or [N, S] per token; 0 where it is not chosen."""
        if self.experts is None:
            chosen = self.weights[..., index]
        else:
            named = self.experts == index  # [N, K]
            chosen = (self.weights * (named.unsqueeze(1) if self.by_token else named)).sum(-1)
        return chosen if self.by_token else chosen.unsqueeze(-1)

    def dense_weights(self, num_experts: int) -> Tensor:
        """Return the weight of every expert of the model: [N, E] per row or [N, S, E] per token."""
        if self.experts is None:
            return self.weights
        experts = self.experts.unsqueeze(1).expand_as(self.weights) if self.by_token else self.experts
        zeros = self.weights.new_zeros(*self.weights.shape[:-1], num_experts)
        return zeros.scatter_add(-1, experts, self.weights)

    def reindexed(self, places: Sequence[int], *, num_experts: int) -> "Routing":
        """Return this routing, made by a gate over some experts, for a model with others besides.

        Args:
            places: Of the gate's experts among those of the model, (G,).
            num_experts: E of the model; ``logits`` stay those of the G experts.
        """
        if list(places) == list(range(num_experts)):
            return self
        where = torch.tensor(list(places), device=self.weights.device)
        if self.experts is not None:
            return replace(self, experts=where[self.experts])
        every = self.weights.new_zeros(*self.weights.shape[:-1], num_experts)
        return replace(self, weights=every.index_copy(-1, where, self.weights))

    def with_expert(self, expert: int, rows: Tensor) -> "Routing":
        """Return this routing with one expert in some rows at a weight of 1, whatever they choose.

        Args:
            expert: Its index.
            rows: [N], 1 for rows that use it, else 0.
        """
        added = rows.to(self.weights).view(-1, *[1] * (self.weights.dim() - 1))  # [N, 1] or [N, 1, 1]
        if self.experts is None:
            named = torch.arange(self.weights.shape[-1], device=self.weights.device) == expert
            return replace(self, weights=torch.where(named & (added > 0), 1.0, self.weights))
        named = self.experts == expert
        weights = torch.where((named.unsqueeze(1) if self.by_token else named) & (added > 0), 0.0, self.weights)
        experts = torch.cat([self.experts, torch.full_like(self.experts[:, :1], expert)], -1)
        return replace(self, experts=experts, weights=torch.cat([weights, added.expand_as(weights[..., :1])], -1))

    def segments(self, *, single_rows: bool = False) -> list[slice]:
        """Cut the rows into stretches that one expert serves alone; all other rows stand for themselves."""
        known = not single_rows and self.experts is not None and not self.by_token and self.experts.shape[1] == 1
        keys: list[Any] = [None] * len(self.weights)
        if known:
            assert self.experts is not None
            keys = list(zip(self.experts[:, 0].tolist(), self.weights[:, 0].tolist(), strict=True))
        found: list[slice] = []
        for row, key in enumerate(keys):
            if found and key is not None and key[1] == 1 and keys[row - 1] == key:
                found[-1] = slice(found[-1].start, row + 1)
            else:
                found.append(slice(row, row + 1))
        return found

    def take(self, rows: Sequence[int] | slice) -> "Routing":
        """Return the routing of some rows."""
        chosen = rows if isinstance(rows, slice) else list(rows)
        return replace(
            self,
            experts=None if self.experts is None else self.experts[chosen],
            weights=self.weights[chosen],
            logits=None if self.logits is None else self.logits[chosen],
            confidence=None if self.confidence is None else self.confidence[chosen],
            dropped=None if self.dropped is None else self.dropped[chosen],
        )


@dataclass
class ForwardPass:
    """What the layers need to know of a running forward pass."""

    routing: Routing | None
    """None leaves all layers as the backbone has them."""
    changes: dict[int, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    """Block to functions on the hidden states [N, S, hidden] that enter it, in order."""
    trunk: Tensor | None = None
    """[N, S, hidden] that enter ``first_block``; the blocks below hand it on in place of computing it."""
    first_block: int = 0
    generator: torch.Generator | None = None
    """Of dropout; None takes the global one."""


class RoutingSlot:
    """Hands what a forward pass knows to the layers and blocks, which transformers' blocks cannot pass on.

    Every thread has a slot of its own, so that several may run the same model; in each, one pass at a time.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def running(self) -> ForwardPass | None:
        """The pass that runs in this thread, if one does."""
        found: ForwardPass | None = getattr(self._local, "running", None)
        return found

    @contextlib.contextmanager
    def filled(self, routing: Routing | ForwardPass) -> Iterator[ForwardPass]:
        """Hold a routing, or all that there is to know of a pass, while it runs."""
        if self.running is not None:
            raise RuntimeError("This model is already in a forward pass in this thread; one cannot start another.")
        running = routing if isinstance(routing, ForwardPass) else ForwardPass(routing)
        self._local.running = running
        try:
            yield running
        finally:
            self._local.running = None

    def replace(self, routing: Routing) -> None:
        """Change the routing in the middle of a forward pass, for the layers that come next."""
        self.read()
        self._local.running.routing = routing

    def read(self) -> Routing | None:
        """Return the routing of the running forward pass, None for the bare backbone."""
        if self.running is None:
            raise RuntimeError("An expert layer was called outside SparseExpertModel.forward: no routing is set.")
        return self.running.routing

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Drop entries of a tensor as in training, with the numbers of the running pass."""
        generator = None if self.running is None else self.running.generator
        if generator is None:
            return functional.dropout(x, probability)
        kept = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
        return x * kept.div_(1 - probability)

    def listen(self, blocks: Iterable[nn.Module]) -> None:
        """Let the blocks of a backbone heed the running pass: its changes to their input, and its kept trunk."""
        for index, block in enumerate(blocks):
            block.forward = functools.partial(self._run_block, index, block.forward)

    def _run_block(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self.running
        if running is None:
            return forward(*args, **kwargs)
        if running.trunk is not None and index < running.first_block:
            return running.trunk
        for change in running.changes.get(index, ()):
            if args:
                args = (change(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = change(kwargs["hidden_states"])
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingSlot":
        return RoutingSlot()
