"""Gates: which experts serve a row or a token.

A gate sees the hidden states that enter a block and answers with a routing. Logits and weights are float32 whatever the
backbone computes in. Shapes: N rows, S tokens a row, H hidden size, E experts, K chosen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_ft.backbone.pooling import pool
from sparse_ft.experts.familiarity import Familiarity
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection

_UNITS = 128
"""Of the perceptron's hidden layer."""


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
    """A perceptron over the means of what enters the lower blocks: one decision a text, before the model runs on it.

    All states are those of the bare backbone, so they are the same whichever expert is chosen, and all of them are
    there once the highest block that is read is reached.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        block: 0-based; it reads what enters this block and each below it.
        selection: How the logits become a routing.
        num_pairs: Of the familiarity, if it is to be loaded.
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self, names: Sequence[str], hidden_size: int, *, block: int, selection: Selection, num_pairs: int = 0
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.block = block
        self.selection = selection
        num_features = (block + 1) * hidden_size
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.classifier = self._classifier(num_features)
        self.familiarity = Familiarity(len(self.names), hidden_size, num_pairs=num_pairs)

    def _classifier(self, num_features: int) -> nn.Module:
        last = nn.Linear(_UNITS, len(self.names))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(num_features, _UNITS), nn.GELU(), last)

    def initialise(self, generator: torch.Generator) -> None:
        """Fill the classifier as ``nn.Linear`` does, with a bias of 0."""
        for parameter in self.classifier.parameters():
            if parameter.dim() == 2:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                nn.init.zeros_(parameter)

    def standardise(self, means: Tensor) -> None:
        """Centre and scale the features by what ``means`` [rows, block + 1, H] show."""
        self.center.copy_(means.flatten(1).mean(0))
        spread = means.flatten(1).std(0, correction=0)
        self.scale.copy_(torch.where(spread > 1e-6, 1 / spread, 1.0))

    def features(self, means: Tensor) -> Tensor:
        """Return what the classifier reads: [N, block + 1, H] to [N, (block + 1) * H]."""
        return (means.float().flatten(1) - self.center) * self.scale

    def decide(
        self,
        means: Tensor,
        tokens: Sequence[Sequence[int]] | None = None,
        *,
        excluded: Sequence[int] = (),
        abstains: bool = True,
        training: bool = False,
    ) -> Routing:
        """Choose experts for texts.

        Args:
            means: Of what enters the blocks 0 to ``block``, over the real tokens of each text, [N, block + 1, H].
            tokens: Ids of each text, for its familiarity; None takes the probability of the best expert in its place.
            excluded: Experts that may not be chosen.
            abstains: Whether ``selection.min_confidence`` holds.
            training: Whether the capacity of experts holds.
        """
        with _float32(means):
            features = self.features(means)
            confidence = None
            if tokens is not None and self.familiarity.fitted:
                confidence = self.familiarity(self.top_block_features(features), tokens)
            logits = self.classifier(features)
            if excluded:
                logits[:, list(excluded)] = -torch.inf
            selection = self.selection if abstains else replace(self.selection, min_confidence=0.0)
            return selection(logits, confidence=confidence, training=training)

    def top_block_features(self, features: Tensor) -> Tensor:
        """Return the features of the highest block that is read, [N, H]."""
        return features[:, -features.shape[1] // (self.block + 1) :]


class PrototypeGate(SequenceGate):
    """The nearest mean of each expert's training texts, by Mahalanobis distance; learns nothing by gradient.

    With one covariance for all experts this is linear discriminant analysis: Hastie, Tibshirani and Friedman 2009,
    section 4.3, https://hastie.su.domains/ElemStatLearn/. Every expert counts the same, however many texts it has.
    """

    def _classifier(self, num_features: int) -> nn.Module:
        linear = nn.Linear(num_features, len(self.names))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def fit(self, features: Sequence[Tensor]) -> None:
        """Take the mean of each expert's texts and the covariance around them, from [rows, features] of each."""
        from sklearn.covariance import ledoit_wolf_shrinkage

        means = torch.stack([rows.double().mean(0) for rows in features])  # [E, F]
        centred = [rows.double() - mean for rows, mean in zip(features, means, strict=True)]
        covariance = torch.stack([rows.t() @ rows / len(rows) for rows in centred]).mean(0)
        level = covariance.diagonal().mean().clamp_min(1e-6)
        shrinkage = max(1e-3, float(ledoit_wolf_shrinkage(torch.cat(centred).numpy(), assume_centered=True)))
        covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(len(covariance), dtype=torch.float64)
        weight = torch.cholesky_solve(means.t(), torch.linalg.cholesky(covariance)).t()  # [E, F]
        assert isinstance(self.classifier, nn.Linear)
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.copy_(-(weight * means).sum(1) / 2)


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
        selection: How the logits become a routing.
        shortlist: Experts a text and block, at least ``selection.top_k``; None takes all.
    """

    every_block = True

    def __init__(
        self,
        names: Sequence[str],
        hidden_size: int,
        *,
        blocks: Sequence[int],
        selection: Selection,
        shortlist: int | None = None,
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.blocks = list(blocks)
        self.selection = selection
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
            logits = linear(self.selection.jittered(hidden, inputs.generator) if self.training else hidden)  # [N, S, E]
        if self.shortlist is None or self.shortlist >= len(self.names):
            return self.selection(logits, mask=mask, training=self.training)
        wanted = pool(logits.softmax(-1), mask, "mean")  # [N, E]
        experts = wanted.topk(self.shortlist, dim=-1).indices  # [N, m]
        among = logits.gather(-1, experts.unsqueeze(1).expand(-1, logits.shape[1], -1))  # [N, S, m]
        inner = self.selection(among, mask=mask, training=self.training)
        return replace(inner, experts=experts, logits=logits)


GATES: dict[str, type[SequenceGate] | type[TokenGate]] = {**TEXT_GATES, "token": TokenGate}
"""The gates that are kept in checkpoints, by the name that configs use."""


def _float32(tensor: Tensor) -> torch.autocast:
    """Keep autocast from a gate's matrix products: near ties would fall to another expert."""
    return torch.autocast(tensor.device.type, enabled=False)
