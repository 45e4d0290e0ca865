"""Which experts serve a row or a token, with which weights, and how the layers learn of it.

Shapes: N rows, S tokens a row, E experts of the model, K experts chosen per row.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


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

    @classmethod
    def rows(cls, experts: Sequence[int], *, device: torch.device | str = "cpu") -> "Routing":
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

    def weights_of(self, index: int) -> Tensor:
        """Return the weight of one expert, [N, 1] per row or [N, S] per token; 0 where it is not chosen."""
        if self.experts is None:
            chosen = self.weights[..., index]
        else:
            named = self.experts == index  # [N, K]
            chosen = (self.weights * (named.unsqueeze(1) if self.by_token else named)).sum(-1)
        return chosen if self.by_token else chosen.unsqueeze(-1)

    def stretches(self, *, single_rows: bool = False) -> list[slice]:
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
        )


class RoutingSlot:
    """Hands the routing of the running forward pass to the expert layers, which transformers' blocks cannot pass on.

    One forward pass at a time may use a model; ``predict`` holds a lock for that.
    """

    def __init__(self) -> None:
        self._routing: Routing | None = None

    @contextlib.contextmanager
    def filled(self, routing: Routing) -> Iterator[None]:
        """Hold ``routing`` in the slot while a forward pass runs."""
        if self._routing is not None:
            raise RuntimeError("This model is already in a forward pass; use one model object per thread.")
        self._routing = routing
        try:
            yield
        finally:
            self._routing = None

    def replace(self, routing: Routing) -> None:
        """Change the routing in the middle of a forward pass, for the layers that come next."""
        self.read()
        self._routing = routing

    def read(self) -> Routing:
        """Return the routing of the running forward pass."""
        if self._routing is None:
            raise RuntimeError("An expert layer was called outside SparseExpertModel.forward: no routing is set.")
        return self._routing
