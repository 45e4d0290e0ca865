"""Fit the gate that reads whole texts: which expert does a text belong to?

The experts stay as they are. The gate sees the mean of the hidden states that enter a block, by default the middle one,
as the bare backbone computes them. These are the same whichever expert will be chosen, so it is a linear classifier on
fixed features.
"""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_ft.choosing import Choice
from sparse_ft.config import GateConfig
from sparse_ft.encoding import Example
from sparse_ft.errors import ConfigError
from sparse_ft.gates import PrototypeGate, SequenceGate
from sparse_ft.inference import pooled_entering, text_routing
from sparse_ft.model import SparseExpertModel

_HELD_OUT = 5
"""One text in so many says how far from its expert's texts a text that belongs here may be."""


def fit_gate(
    model: SparseExpertModel,
    examples: Mapping[str, Sequence[Example]],
    *,
    settings: GateConfig,
    seed: int,
    names: Sequence[str] | None = None,
) -> SequenceGate:
    """Fit a gate over experts of a model.

    Args:
        model: In evaluation mode.
        examples: Training rows per expert; ``settings.rows`` of each are drawn.
        settings: Of the run.
        seed: Draws the rows.
        names: The experts; None takes all.

    Raises:
        ConfigError: If an expert has fewer than two rows.
    """
    names = list(names or model.experts.names)
    lacking = [name for name in names if len(examples.get(name, ())) < 2]
    if lacking:
        raise ConfigError(
            f"The gate needs texts of every expert, and {lacking[0]!r} has fewer than two. Name the data of its task "
            "with --data, or remove the expert."
        )
    block = gate_block(model, settings)
    pooled = {
        name: pooled_entering(model, _draw(examples[name], settings.rows, f"{seed}/{name}"), block=block)
        for name in names
    }
    kind = PrototypeGate if settings.type == "prototype" else SequenceGate
    choice = Choice(top_k=settings.top_k or 1, temperature=settings.temperature, min_confidence=settings.min_confidence)
    gate = kind(names, model.backbone.hidden_size, block=block, choice=choice)
    train = {name: rows[torch.arange(len(rows)) % _HELD_OUT > 0] for name, rows in pooled.items()}
    held_out = torch.cat([rows[::_HELD_OUT] for rows in pooled.values()])
    if isinstance(gate, PrototypeGate):
        gate.fit(train)
    else:
        gate.standardise(torch.cat(list(train.values())))
        _fit_linear(gate, train)
    with torch.no_grad():
        gate.familiarity.fit([gate.features(rows) for rows in train.values()], gate.features(held_out))
    return gate.requires_grad_(False).eval().to(model.device)


def gate_block(model: SparseExpertModel, settings: GateConfig) -> int:
    """Return the 0-based block whose input a gate for texts reads."""
    middle = max(model.first_block, model.backbone.num_blocks // 2)
    return min(middle, model.backbone.num_blocks - 1) if settings.block is None else settings.block


def _draw(examples: Sequence[Example], number: int, key: str) -> list[Example]:
    return random.Random(key).sample(list(examples), min(number, len(examples)))


def _fit_linear(gate: SequenceGate, train: Mapping[str, Tensor]) -> None:
    """Logistic regression, each expert weighing the same however many rows it has."""
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([gate.features(rows) for rows in train.values()]).double().numpy()
    targets = [place for place, rows in enumerate(train.values()) for _ in range(len(rows))]
    fitted = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced").fit(features, targets)
    weights, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if len(train) == 2:  # one row of weights, for the second class
        weights, bias = torch.cat([-weights / 2, weights / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        gate.linear.weight.copy_(weights)
        gate.linear.bias.copy_(bias)


def routing_accuracy(model: SparseExpertModel, examples: Sequence[Example], *, expert: str) -> float:
    """Return the share of rows whose best expert is ``expert``, 0 to 1."""
    logits = text_routing(model, examples).logits
    assert logits is not None
    return float((logits.argmax(-1) == model.text_gate().names.index(expert)).float().mean())
