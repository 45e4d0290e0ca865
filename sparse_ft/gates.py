"""Gates: which experts serve a row or a token.

A gate sees the hidden states that enter the lowest block with experts and answers with a routing. Logits and weights
are float32 whatever the backbone computes in. Shapes: N rows, S tokens a row, H hidden size, E experts, K chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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


class Gate(Protocol):
    """Chooses among the experts ``names``, whose order is that of the model."""

    names: list[str]
    every_block: bool
    """Whether it is asked at every block with experts, or once where they begin."""

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each row, or for each token."""
        ...


@dataclass(frozen=True)
class Choice:
    """How logits become chosen experts and weights."""

    top_k: int = 1
    """Experts that are computed, 1 to E."""
    top_p: float | None = None
    """Stop adding experts once their probabilities reach this sum, 0 to 1; ``top_k`` stays the most."""
    temperature: float = 1.0
    """Divides the logits, above 0."""
    normalise: bool = True
    """Whether the weights of the chosen sum to 1 (Mixtral) or are the probabilities (Switch)."""
    min_confidence: float = 0.0
    """Below this probability of the best expert the routing abstains: all weights are 0."""
    jitter: float = 0.0
    """In training, multiply each logit by a number drawn from 1 - jitter to 1 + jitter (Switch)."""
    capacity: float | None = None
    """In training, most rows or tokens per expert, in multiples of an even share; None drops none."""
    training: bool = field(default=False, compare=False)

    def __call__(self, logits: Tensor, *, mask: Tensor | None = None) -> Routing:
        """Choose the best experts.

        Top-k after the softmax: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; k = 1 and jitter: Fedus et al.
        2021, https://arxiv.org/abs/2101.03961; renormalised weights: Jiang et al. 2024, https://arxiv.org/abs/2401.04088.

        Args:
            logits: [N, E], or [N, S, E] to choose for each token.
            mask: [N, S], 1 for real tokens; only ``capacity`` needs it.

        Returns:
            Per row the K best experts; per token a weight for every expert, 0 for those that are not chosen.
        """
        noisy = logits.float()
        if self.training and self.jitter:
            noisy = noisy * torch.empty_like(noisy).uniform_(1 - self.jitter, 1 + self.jitter)
        probabilities = (noisy / self.temperature).softmax(-1)
        weights, experts = probabilities.topk(min(self.top_k, logits.shape[-1]), dim=-1)  # [..., K]
        if self.top_p is not None:
            before = weights.cumsum(-1) - weights
            weights = torch.where(before < self.top_p, weights, 0.0)  # the first always stays
        sure = probabilities.amax(-1, keepdim=True) >= self.min_confidence
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = torch.where(sure, weights, 0.0)
        if self.training and self.capacity is not None:
            weights = within_capacity(experts, weights, logits.shape[-1], factor=self.capacity, mask=mask)
        if logits.dim() == 2:
            return Routing(experts, weights, logits.float())
        every = torch.zeros_like(probabilities).scatter(-1, experts, weights)  # [N, S, E]
        return Routing(None, every, logits.float())


def within_capacity(
    experts: Tensor, weights: Tensor, num_experts: int, *, factor: float, mask: Tensor | None = None
) -> Tensor:
    """Drop what exceeds each expert's share; those that come first in the batch stay.

    Fedus et al. 2021, section 2.2, https://arxiv.org/abs/2101.03961: capacity is tokens / experts * factor.

    Args:
        experts: [..., K] chosen indices.
        weights: [..., K]; a weight of 0 takes no place.
        num_experts: E.
        factor: 1 is an even share.
        mask: [...], 0 for padding, which takes no place.

    Returns:
        The weights with 0 where an expert was full, [..., K].
    """
    real = weights > 0
    if mask is not None:
        real = real & mask.bool().unsqueeze(-1)
    chosen = torch.nn.functional.one_hot(experts, num_experts).flatten(0, -2) * real.flatten().unsqueeze(-1)  # [T, E]
    place = (chosen.cumsum(0) * chosen).sum(-1).view(experts.shape)  # 1-based place in the expert's queue
    capacity = int(real.sum()) / num_experts * factor
    return torch.where(place <= capacity, weights, 0.0)


class SequenceGate(nn.Module):
    """A linear classifier over the mean of the hidden states: one decision a text.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        choice: How the logits become a routing.
    """

    every_block = False

    def __init__(self, names: Sequence[str], hidden_size: int, *, choice: Choice) -> None:
        super().__init__()
        self.names = list(names)
        self.choice = choice
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.linear = nn.Linear(hidden_size, len(self.names))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the standardised mean over real tokens, [N, H] float32."""
        return (pool(hidden, attention_mask, "mean") - self.center) * self.scale

    def standardise(self, pooled: Tensor) -> None:
        """Centre and scale the features by what ``pooled`` [rows, H] shows."""
        self.center.copy_(pooled.mean(0))
        self.scale.copy_(1 / pooled.std(0).clamp_min(1e-6))

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each row."""
        logits = self.linear(self.features(inputs.hidden, inputs.attention_mask))
        return self.choice(logits)


class PrototypeGate(SequenceGate):
    """The nearest mean of each expert's training texts, by cosine; learns nothing by gradient.

    As the router of Arrow and of mergekit-moe's "hidden" mode: https://arxiv.org/abs/2405.11157.
    """

    sharpness = 20.0
    """Multiplies the cosine, -1 to 1, to give logits."""

    def fit(self, pooled: Mapping[str, Tensor]) -> None:
        """Take the mean of each expert's pooled texts, [rows, H] each; every expert counts the same."""
        self.center.copy_(torch.stack([pooled[name].mean(0) for name in self.names]).mean(0))
        spread = torch.stack([pooled[name].std(0) for name in self.names]).mean(0)
        self.scale.copy_(1 / spread.clamp_min(1e-6))
        means = torch.stack([(pooled[name].mean(0) - self.center) * self.scale for name in self.names])
        with torch.no_grad():
            self.linear.weight.copy_(torch.nn.functional.normalize(means, dim=-1) * self.sharpness)

    def features(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the standardised mean over real tokens at length 1, [N, H]."""
        return torch.nn.functional.normalize(super().features(hidden, attention_mask), dim=-1)


class TokenGate(nn.Module):
    """A linear layer per block: each token chooses its experts anew in every block.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        blocks: 0-based blocks with experts.
        choice: How the logits become a routing.
    """

    every_block = True

    def __init__(self, names: Sequence[str], hidden_size: int, *, blocks: Sequence[int], choice: Choice) -> None:
        super().__init__()
        self.names = list(names)
        self.blocks = list(blocks)
        self.choice = choice
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
        return self.choice(linear(inputs.hidden.float()), mask=inputs.attention_mask)


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
        return self.choice((inputs.hidden.float() @ vectors.t()).abs(), mask=inputs.attention_mask)
