"""How a gate's logits become experts and their weights.

Shapes: N rows, S tokens a row, E experts, K selected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.config import GateConfig
from sparse_ft.errors import ConfigError
from sparse_ft.experts.routing import Routing


@dataclass(frozen=True)
class Selection:
    """The rule that turns logits into experts and weights."""

    top_k: int = 1
    """Number of experts that are computed, 1 to E."""
    top_p: float | None = None
    """Stop adding experts once their probabilities reach this sum, 0 to 1; ``top_k`` stays the maximum."""
    temperature: float = 1.0
    """Divides the logits, above 0."""
    normalise: bool = True
    """Whether the weights of the selected experts sum to 1 (Mixtral) or are the probabilities (Switch)."""
    min_confidence: float = 0.0
    """Below this familiarity (without one: probability of the best expert) the routing abstains: weights of 0. A route
    may hold another number that the user gave."""
    jitter: float = 0.0
    """In training, multiply the gate's input by numbers drawn from 1 - jitter to 1 + jitter (Switch)."""
    capacity: float | None = None
    """In training, maximum of rows or tokens per expert, in multiples of an even share; None drops none."""

    @classmethod
    def from_settings(cls, settings: GateConfig, *, joint: bool, min_confidence: float = 0.0) -> "Selection":
        """Return the rule of a run's gate.

        Args:
            settings: Section ``gate`` of the run's config.
            joint: Whether the gate is trained with its experts: then two experts by default, Switch's weights for one
                expert, and jitter and capacity hold.
            min_confidence: Used if the run sets none.
        """
        top_k = settings.top_k or (2 if joint else 1)
        return cls(
            top_k=top_k,
            top_p=settings.top_p,
            temperature=settings.temperature,
            normalise=top_k > 1 or not joint,
            min_confidence=min_confidence if settings.min_confidence is None else settings.min_confidence,
            jitter=settings.jitter if joint else 0.0,
            capacity=settings.capacity if joint else None,
        )

    def __call__(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        confidence: Tensor | None = None,
        training: bool = False,
    ) -> Routing:
        """Select the best experts.

        Top-k after the softmax: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; k = 1 and jitter: Fedus et al.
        2021, https://arxiv.org/abs/2101.03961; renormalised weights: Jiang et al. 2024, https://arxiv.org/abs/2401.04088.

        Args:
            logits: [N, E], or [N, S, E] to select for each token.
            mask: [N, S], 1 for real tokens; only ``capacity`` needs it.
            confidence: [N], or [N, S], 0 to 1; None takes the probability of the best expert.
            training: Whether ``capacity`` holds.

        Returns:
            The K best experts of each row, or a weight for every expert and token, 0 for experts not selected.

        Raises:
            ConfigError: If there are fewer than ``top_k`` experts.
        """
        if self.top_k > logits.shape[-1]:
            raise ConfigError(f"gate.top_k is {self.top_k}, but there are {logits.shape[-1]} experts. Lower it.")
        probabilities = (logits.float() / self.temperature).softmax(-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)  # [..., K]
        confidence = probabilities.amax(-1) if confidence is None else confidence
        weights, dropped = self._weights(weights, confidence), None
        if training and self.capacity is not None:
            within = within_capacity(experts, weights, logits.shape[-1], factor=self.capacity, mask=mask)
            dropped = ((weights > 0) & (within == 0)).sum(-1)
            dropped = dropped if mask is None or mask.dim() != dropped.dim() else dropped * mask
            weights = within
        if logits.dim() == 2:
            return Routing(experts, weights, logits.float(), confidence, dropped)
        every = torch.zeros_like(probabilities).scatter(-1, experts, weights)  # [N, S, E]
        return Routing(None, every, logits.float(), confidence, dropped)

    def _weights(self, weights: Tensor, confidence: Tensor) -> Tensor:
        """Apply ``top_p``, ``normalise`` and ``min_confidence`` to probabilities in descending order, [..., K]."""
        if self.top_p is not None:
            before = weights.cumsum(-1) - weights
            before[..., 0] = -1.0  # the best expert always stays
            weights = torch.where(before < self.top_p, weights, 0.0)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return torch.where((confidence >= self.min_confidence).unsqueeze(-1), weights, 0.0)

    def jittered(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return hidden states [..., H] with jitter on them, for a gate in training."""
        if not self.jitter:
            return hidden
        return hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter, generator=generator)


def within_capacity(
    experts: Tensor, weights: Tensor, num_experts: int, *, factor: float, mask: Tensor | None = None
) -> Tensor:
    """Drop rows or tokens beyond each expert's capacity; the first ones in the batch stay.

    Fedus et al. 2021, section 2.2, https://arxiv.org/abs/2101.03961: capacity is tokens / experts * factor, 1 at least.

    Args:
        experts: [..., K] selected indices.
        weights: [..., K]; a weight of 0 takes no capacity.
        num_experts: E.
        factor: 1 is an even share.
        mask: [...], 0 for padding, which takes no capacity.

    Returns:
        The weights with 0 where an expert was full, [..., K].
    """
    real = weights > 0
    if mask is not None:
        real = real & mask.bool().unsqueeze(-1)
    selected = functional.one_hot(experts, num_experts).flatten(0, -2) * real.flatten().unsqueeze(-1)  # [T, E]
    rank = (selected.cumsum(0) * selected).sum(-1).view(experts.shape)  # from 1, in the expert's queue
    capacity = max(1.0, int(real.sum()) / num_experts * factor)
    return torch.where(rank <= capacity, weights, 0.0)
