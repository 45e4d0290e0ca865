"""Gates, which turn the hidden states that enter a block into a routing.

Logits and weights are float32 whatever the backbone computes in. Shapes: N rows, S tokens a row, H hidden size,
E experts of the gate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from sparse_ft.backbone.pooling import pool
from sparse_ft.experts.familiarity import Familiarity
from sparse_ft.experts.groups import Groups
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection

_SAVED_SELECTION = ("top_k", "top_p", "temperature", "normalise", "min_confidence")
"""Fields of ``Selection`` that a manifest holds; the others matter in training only."""
_PERCEPTRON_SIZE = 128
"""Width of the perceptron's hidden layer."""


@dataclass(frozen=True)
class GateInput:
    """What a gate may read of the rows of a batch."""

    hidden: Tensor
    """[N, S, H], entering ``block``."""
    attention_mask: Tensor
    """[N, S], 1 for real tokens."""
    block: int
    """0-based block that the hidden states enter."""
    generator: torch.Generator | None = None
    """Source of random numbers for a gate in training; None takes the global one."""


class Gate(Protocol):
    """Chooses among the experts ``names`` anew in each of the 0-based blocks ``blocks``."""

    names: list[str]
    blocks: list[int]

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each row, or for each token, of one block."""
        ...


class SequenceGate(nn.Module):
    """A perceptron over mean hidden states of the lower blocks, which decides once a text, before its experts run.

    It reads states of the bare backbone, or of the expert that all tasks share, which do not depend on the choice.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        block: 0-based; the gate reads the states that enter this block and each block below it.
        selection: How the logits become a routing.
        num_pairs: Number of token pairs of a familiarity whose weights will be loaded.
        groups: Experts whose tasks are asked of the same texts, by group; every other expert is a group alone.
        by_group: See ``Familiarity``.
        trunk_expert: Expert whose states the gate reads; None reads the bare backbone.

    Raises:
        ValueError: If a group names an unknown expert, or two groups the same.
    """

    every_block: Literal[False] = False
    saved: ClassVar[dict[str, str]] = {"block": "block", "pairs": "num_pairs"}
    """Key in a manifest to argument of the constructor and attribute."""
    added: ClassVar[dict[str, str]] = {
        "groups": "groups",
        "familiarity_by_group": "by_group",
        "trunk_expert": "trunk_expert",
    }
    """The same for keys that are absent where they are empty, as in the manifests of version 0.1."""

    center: Tensor
    scale: Tensor

    def __init__(
        self,
        names: Sequence[str],
        hidden_size: int,
        *,
        block: int,
        selection: Selection,
        num_pairs: int = 0,
        groups: Sequence[Sequence[str]] = (),
        by_group: bool = True,
        trunk_expert: str | None = None,
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.partition = Groups(self.names, groups)
        self.block = block
        self.trunk_expert = trunk_expert or None
        self.selection = selection
        num_features = (block + 1) * hidden_size
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.classifier = self._classifier(num_features)
        self.familiarity = Familiarity(len(self.partition), hidden_size, num_pairs=num_pairs, by_group=by_group)

    @property
    def num_pairs(self) -> int:
        """Number of token pairs that the familiarity knows."""
        return len(self.familiarity.pairs)

    @property
    def by_group(self) -> bool:
        """Whether the familiarity has a calibration for each group."""
        return self.familiarity.by_group

    @property
    def groups(self) -> list[list[str]]:
        """The experts of each group of several."""
        return [[self.names[index] for index in members] for members in self.partition.members if len(members) > 1]

    @property
    def leads(self) -> list[str]:
        """The first expert of every group, which stands for the group until the task is known."""
        return [self.names[members[0]] for members in self.partition.members]

    def companions(self, expert: str) -> list[str]:
        """Return the experts of an expert's group, itself included."""
        return next((group for group in self.groups if expert in group), [expert])

    def _classifier(self, num_features: int) -> nn.Module:
        last = nn.Linear(_PERCEPTRON_SIZE, len(self.names))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(num_features, _PERCEPTRON_SIZE), nn.GELU(), last)

    def initialise(self, generator: torch.Generator) -> None:
        """Fill the classifier as ``nn.Linear`` does, with a bias of 0."""
        for parameter in self.classifier.parameters():
            if parameter.dim() == 2:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                nn.init.zeros_(parameter)

    def standardise(self, means: Tensor) -> None:
        """Take centre and scale of the features from ``means`` [rows, block + 1, H]."""
        self.center.copy_(means.flatten(1).mean(0))
        spread = means.flatten(1).std(0, correction=0)
        self.scale.copy_(torch.where(spread > 1e-6, 1 / spread, 1.0))

    def features(self, means: Tensor) -> Tensor:
        """Return the classifier's input: [N, block + 1, H] to [N, (block + 1) * H]."""
        return (means.float().flatten(1) - self.center) * self.scale

    def decide(
        self,
        means: Tensor,
        tokens: Sequence[Sequence[int]] | None = None,
        *,
        excluded: Sequence[int] = (),
        min_familiarity: float | None = None,
        mixes: bool = False,
        training: bool = False,
    ) -> Routing:
        """Choose groups of experts for texts, or experts to mix.

        Args:
            means: Mean over each text's real tokens of the states that enter the blocks 0 to ``block``,
                [N, block + 1, H].
            tokens: Token ids of each text, for its familiarity; None takes the probability of the best expert instead.
            excluded: Indices of experts that may not be chosen.
            min_familiarity: In place of ``selection.min_confidence``; 0 turns no text away.
            mixes: Whether experts are chosen one by one, as in tasks that were trained jointly, and not by group.
            training: Whether ``selection.capacity`` holds.

        Returns:
            A routing with indices of ``names`` if the gate mixes, else of ``leads``.
        """
        with without_autocast(means):
            features = self.features(means)
            logits = self.classifier(features)
            if excluded:
                logits[:, list(excluded)] = -torch.inf
            by_group, confidence = self.partition.logits(logits), None
            if tokens is not None and self.familiarity.fitted:
                top = self.top_block_features(features)
                confidence = self.familiarity(top, tokens, groups=by_group.argmax(-1))
            selection = self.selection
            if min_familiarity is not None:
                selection = replace(selection, min_confidence=min_familiarity)
            return selection(logits if mixes else by_group, confidence=confidence, training=training)

    def top_block_features(self, features: Tensor) -> Tensor:
        """Return the features of ``block``, the highest one that the gate reads, [N, H]."""
        return features[:, -features.shape[1] // (self.block + 1) :]


class PrototypeGate(SequenceGate):
    """The nearest mean of each expert's training texts, by Mahalanobis distance; needs no gradient.

    With one covariance for all experts this is linear discriminant analysis: Hastie, Tibshirani and Friedman 2009,
    section 4.3, https://hastie.su.domains/ElemStatLearn/. Every expert has the same weight, however many texts it has.
    """

    def _classifier(self, num_features: int) -> nn.Module:
        linear = nn.Linear(num_features, len(self.names))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def fit(self, features: Sequence[Tensor]) -> None:
        """Estimate the mean of each group's texts and their common covariance; a group's experts get the same logit.

        Args:
            features: Texts of each group, [rows, features].
        """
        from sklearn.covariance import ledoit_wolf_shrinkage

        means = torch.stack([rows.double().mean(0) for rows in features])  # [G, F]
        centred = [rows.double() - mean for rows, mean in zip(features, means, strict=True)]
        covariance = torch.stack([rows.t() @ rows / len(rows) for rows in centred]).mean(0)
        level = covariance.diagonal().mean().clamp_min(1e-6)
        shrinkage = max(1e-3, float(ledoit_wolf_shrinkage(torch.cat(centred).numpy(), assume_centered=True)))
        covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(len(covariance), dtype=torch.float64)
        weight = torch.cholesky_solve(means.t(), torch.linalg.cholesky(covariance)).t()  # [G, F]
        bias = -(weight * means).sum(1) / 2
        assert isinstance(self.classifier, nn.Linear)
        with torch.no_grad():
            for group, members in enumerate(self.partition.members):
                self.classifier.weight[list(members)] = weight[group].float()
                self.classifier.bias[list(members)] = bias[group].float()


TEXT_GATES: dict[str, type[SequenceGate]] = {"sequence": SequenceGate, "prototype": PrototypeGate}
"""Gates that decide once a text, by their name in configs and manifests."""


class TokenGate(nn.Module):
    """A linear layer per block, which chooses the experts of each token anew in every block.

    With a shortlist, the tokens of one text choose among the experts with the highest mean probability over the text,
    so only these are computed, whatever the number of experts.

    Args:
        names: Experts to choose among.
        hidden_size: H.
        blocks: 0-based blocks with experts.
        selection: How the logits become a routing.
        shortlist: Number of experts per text and block, at least ``selection.top_k``; None takes all.
    """

    every_block: Literal[True] = True
    saved: ClassVar[dict[str, str]] = {"blocks": "blocks", "shortlist": "shortlist"}
    """Key in a manifest to argument of the constructor and attribute."""
    added: ClassVar[dict[str, str]] = {}

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

    @property
    def classifier(self) -> nn.Module:
        """The linears, under the name that the trained part of every gate has."""
        return self.linears

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
        with without_autocast(hidden):
            logits = linear(self.selection.jittered(hidden, inputs.generator) if self.training else hidden)  # [N, S, E]
        if self.shortlist is None or self.shortlist >= len(self.names):
            return self.selection(logits, mask=mask, training=self.training)
        mean_probabilities = pool(logits.softmax(-1), mask, "mean")  # [N, E]
        experts = mean_probabilities.topk(self.shortlist, dim=-1).indices  # [N, m]
        among = logits.gather(-1, experts.unsqueeze(1).expand(-1, logits.shape[1], -1))  # [N, S, m]
        inner = self.selection(among, mask=mask, training=self.training)
        return replace(inner, experts=experts, logits=logits)


GATES: dict[str, type[SequenceGate] | type[TokenGate]] = {**TEXT_GATES, "token": TokenGate}
"""All gates that checkpoints hold, by their name in configs and manifests."""


def describe_gate(gate: SequenceGate | TokenGate) -> dict[str, Any]:
    """Return the entry of a gate in a manifest, from which ``build_gate`` makes one of the same shape."""
    return {
        "type": next(name for name, known in GATES.items() if type(gate) is known),
        "experts": gate.names,
        **{key: getattr(gate, attribute) for key, attribute in gate.saved.items()},
        **{key: value for key, attribute in gate.added.items() if (value := getattr(gate, attribute))},
        **{key: getattr(gate.selection, key) for key in _SAVED_SELECTION},
    }


def build_gate(described: Mapping[str, Any], hidden_size: int) -> SequenceGate | TokenGate:
    """Build a gate without weights from its entry in a manifest.

    Raises:
        KeyError, TypeError, ValueError: If a key is missing, or a type or expert unknown.
    """
    kind = GATES[described["type"]]
    selection = Selection(**{key: described[key] for key in _SAVED_SELECTION})
    arguments = {argument: described[key] for key, argument in kind.saved.items()}
    arguments |= {argument: described.get(key) or () for key, argument in kind.added.items()}
    return kind(described["experts"], hidden_size, selection=selection, **arguments)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Disable autocast: in lower precision, a gate would decide near ties for another expert."""
    return torch.autocast(tensor.device.type, enabled=False)
