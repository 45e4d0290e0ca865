"""Gates: which experts serve a row or a token.

A gate sees the hidden states that enter a block and answers with a routing. Logits and weights are float32 whatever the
backbone computes in. Shapes: N rows, S tokens a row, H hidden size, E experts, K chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_ft.choosing import Choice
from sparse_ft.familiarity import Familiarity
from sparse_ft.heads import pool
from sparse_ft.routing import Routing


@dataclass(frozen=True)
class GateInput:
    """What a gate may look at."""

    hidden: Tensor
    """[N, S, H], entering ``block``."""
    attention_mask: Tensor
    """[N, S], 1 for real tokens."""
    block: int
    """0-based block that the hidden states enter."""
    texts: Sequence[str] = ()
    """The rows as they were given, if they are known."""
    metadata: Sequence[Mapping[str, Any]] = ()
    """What else the caller says of each row, e.g. its language."""
    generator: torch.Generator | None = None
    """Of what a gate in training draws; None takes the global one."""


class Gate(Protocol):
    """Chooses among the experts ``names``, whose order is that of the model."""

    names: list[str]
    every_block: bool
    """Whether it is asked at every block with experts, or once where they begin."""

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each row, or for each token."""
        ...


class SequenceGate(nn.Module):
    """A linear classifier over the mean of the hidden states: one decision a text.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        block: 0-based block whose input it reads, as the bare backbone computes it.
        choice: How the logits become a routing.
    """

    every_block = False

    center: Tensor
    scale: Tensor

    def __init__(self, names: Sequence[str], hidden_size: int, *, block: int, choice: Choice) -> None:
        super().__init__()
        self.names = list(names)
        self.block = block
        self.choice = choice
        self.register_buffer("center", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.linear = nn.Linear(hidden_size, len(self.names))
        self.familiarity = Familiarity(len(self.names), hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def standardise(self, pooled: Tensor) -> None:
        """Centre and scale the features by what ``pooled`` [rows, H] shows."""
        self.center.copy_(pooled.mean(0))
        self.scale.copy_(_inverse(pooled.std(0, correction=0)))

    def features(self, pooled: Tensor) -> Tensor:
        """Return what the classifier reads of pooled hidden states, [N, H]."""
        return (pooled - self.center) * self.scale

    def decide(self, pooled: Tensor, *, excluded: Sequence[int] = (), training: bool = False) -> Routing:
        """Choose experts for texts.

        Args:
            pooled: Mean over the real tokens of each, [N, H] float32.
            excluded: Experts that may not be chosen.
            training: Whether the capacity of experts holds.
        """
        with _float32(pooled):
            features = self.features(pooled)
            confidence = self.familiarity(features) if self.familiarity.fitted else None
            logits = self.linear(features)
            if excluded:
                logits[:, list(excluded)] = -torch.inf
            return self.choice(logits, confidence=confidence, training=training)

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each row."""
        return self.decide(pool(inputs.hidden, inputs.attention_mask, "mean"))


class PrototypeGate(SequenceGate):
    """The nearest mean of each expert's training texts, by cosine; learns nothing by gradient.

    As the router of Arrow and of mergekit-moe's "hidden" mode: https://arxiv.org/abs/2405.11157.
    """

    sharpness = 20.0
    """Multiplies the cosine, -1 to 1, to give logits."""

    def fit(self, pooled: Mapping[str, Tensor]) -> None:
        """Take the mean of each expert's pooled texts, [rows, H] each; every expert counts the same."""
        self.center.copy_(torch.stack([pooled[name].mean(0) for name in self.names]).mean(0))
        spread = torch.stack([pooled[name].std(0, correction=0) for name in self.names]).mean(0)
        self.scale.copy_(_inverse(spread))
        means = torch.stack([(pooled[name].mean(0) - self.center) * self.scale for name in self.names])
        with torch.no_grad():
            self.linear.weight.copy_(torch.nn.functional.normalize(means, dim=-1) * self.sharpness)

    def features(self, pooled: Tensor) -> Tensor:
        """Return what the cosine is taken of, [N, H] of length 1."""
        return torch.nn.functional.normalize(super().features(pooled), dim=-1)


TEXT_GATES: dict[str, type[SequenceGate]] = {"sequence": SequenceGate, "prototype": PrototypeGate}
"""The gates that decide once a text and are kept in checkpoints, by the name that configs use."""


class TokenGate(nn.Module):
    """A linear layer per block: each token chooses its experts anew in every block.

    With a shortlist, the tokens of one text choose among the experts that its tokens want most on average, so that
    only these are computed, however many there are.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        blocks: 0-based blocks with experts.
        choice: How the logits become a routing.
        shortlist: Experts a text and block, at least ``choice.top_k``; None takes all.
    """

    every_block = True

    def __init__(
        self,
        names: Sequence[str],
        hidden_size: int,
        *,
        blocks: Sequence[int],
        choice: Choice,
        shortlist: int | None = None,
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.blocks = list(blocks)
        self.choice = choice
        self.shortlist = shortlist
        self.linears = nn.ModuleList(nn.Linear(hidden_size, len(self.names), bias=False) for _ in self.blocks)

    def initialise(self, generator: torch.Generator) -> None:
        """Fill the weights with a standard deviation of 0.02."""
        with torch.no_grad():
            for linear in self.linears:
                assert isinstance(linear, nn.Linear)
                linear.weight.normal_(0.0, 0.02, generator=generator)

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each token of one block."""
        linear = self.linears[self.blocks.index(inputs.block)]
        hidden, mask = inputs.hidden.float(), inputs.attention_mask
        with _float32(hidden):
            logits = linear(self.choice.shaken(hidden, inputs.generator) if self.training else hidden)  # [N, S, E]
        if self.shortlist is None or self.shortlist >= len(self.names):
            return self.choice(logits, mask=mask, training=self.training)
        wanted = pool(logits.softmax(-1), mask, "mean")  # [N, E]
        experts = wanted.topk(self.shortlist, dim=-1).indices  # [N, m]
        among = logits.gather(-1, experts.unsqueeze(1).expand(-1, logits.shape[1], -1))  # [N, S, m]
        inner = self.choice(among, mask=mask, training=self.training)
        return replace(inner, experts=experts, logits=logits)


GATES: dict[str, type[SequenceGate] | type[TokenGate]] = {**TEXT_GATES, "token": TokenGate}
"""The gates that are kept in checkpoints, by the name that configs use."""


class ArrowGate(nn.Module):
    """Routes each token by the experts' weights: the larger their first right singular vector responds, the better.

    Ostapenko et al. 2024, "Towards modular LLMs by building and reusing a library of LoRAs",
    https://arxiv.org/abs/2405.11157, section 3.2. One vector a block and expert, of all its deltas that read what
    enters the block, stacked.

    Args:
        names: Experts to choose among.
        vectors: Block to [E, H], each row of length 1, or 0 for an expert without deltas there.
        choice: How the logits become a routing.
    """

    every_block = True

    def __init__(self, names: Sequence[str], vectors: Mapping[int, Tensor], *, choice: Choice) -> None:
        super().__init__()
        self.names = list(names)
        self.choice = choice
        self.blocks = list(vectors)
        self.vectors = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in vectors.values())

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each token of one block."""
        vectors = self.vectors[self.blocks.index(inputs.block)]
        with _float32(inputs.hidden):
            logits = (inputs.hidden.float() @ vectors.t()).abs()
        return self.choice(logits, mask=inputs.attention_mask)


def _float32(tensor: Tensor) -> torch.autocast:
    """Keep autocast from a gate's matrix products: near ties would fall to another expert."""
    return torch.autocast(tensor.device.type, enabled=False)


def _inverse(spread: Tensor) -> Tensor:
    """Return 1 / spread, and 1 where a feature is constant."""
    return torch.where(spread > 1e-6, 1 / spread, 1.0)
