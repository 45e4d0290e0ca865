"""Fit a gate that routes whole texts to frozen experts.

The gate reads the means of the hidden states that enter the blocks up to one, by default the middle one, in the bare
backbone. They do not depend on the experts, so the gate is a classifier on fixed features.
"""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.backbone.encoding import Example
from sparse_ft.config import GateConfig
from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import TEXT_GATES, PrototypeGate, SequenceGate
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import named_generator
from sparse_ft.experts.selection import Selection
from sparse_ft.prediction.routes import Route

_EPOCHS, _MIN_STEPS, _BATCH_SIZE, _LEARNING_RATE = 10, 300, 128, 1e-3
_LABEL_SMOOTHING = 0.1
_HELD_OUT = 5
"""Every fifth text calibrates the familiarity and is held out of its fit. The classifier learns from all texts."""


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
        examples: Training rows by expert; ``settings.rows`` of each are drawn.
        settings: Gate settings of the run.
        seed: Seed of the drawn rows and of the perceptron.
        names: Experts of the gate; None takes all.

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
    drawn = {name: _draw(examples[name], settings.rows, f"{seed}/{name}") for name in names}
    means = {name: mean_states(model, rows, block=block) for name, rows in drawn.items()}
    tokens = {name: [row.input_ids for row in rows] for name, rows in drawn.items()}
    return fit_on_means(means, tokens, settings=settings, seed=seed).to(model.device)


def fit_on_means(
    means: Mapping[str, Tensor], tokens: Mapping[str, Sequence[Sequence[int]]], *, settings: GateConfig, seed: int
) -> SequenceGate:
    """Fit a gate on mean hidden states.

    Args:
        means: [rows, blocks, H] for each expert, at least two rows: the means that enter the blocks up to the highest
            that the gate reads.
        tokens: Token ids of the same texts.
        settings: Gate settings of the run.
        seed: Seed of the perceptron.
    """
    names = list(means)
    _, num_blocks, hidden_size = means[names[0]].shape
    selection = Selection.from_settings(settings, joint=False)
    gate = TEXT_GATES[settings.type](names, hidden_size, block=num_blocks - 1, selection=selection)
    gate.standardise(torch.cat([means[name] for name in names]))
    features = [gate.features(means[name]) for name in names]
    top = [gate.top_block_features(rows) for rows in features]
    gate.familiarity.fit(
        [rows[torch.arange(len(rows)) % _HELD_OUT > 0] for rows in top],
        [ids for name in names for index, ids in enumerate(tokens[name]) if index % _HELD_OUT],
        held_out=torch.cat([rows[::_HELD_OUT] for rows in top]),
        held_out_tokens=[ids for name in names for ids in tokens[name][::_HELD_OUT]],
    )
    if isinstance(gate, PrototypeGate):
        gate.fit(features)
    else:
        generator = named_generator(seed, "gate")
        gate.initialise(generator)
        _fit_perceptron(gate.classifier, features, generator=generator)
    return gate.requires_grad_(False).eval()


def gate_block(model: SparseExpertModel, settings: GateConfig) -> int:
    """Return the highest 0-based block whose input a gate for texts reads."""
    middle = max(model.first_block, model.backbone.num_blocks // 2)
    return min(middle, model.backbone.num_blocks - 1) if settings.block is None else settings.block


def _draw(examples: Sequence[Example], number: int, key: str) -> list[Example]:
    return random.Random(key).sample(list(examples), min(number, len(examples)))


def _fit_perceptron(classifier: nn.Module, features: Sequence[Tensor], *, generator: torch.Generator) -> None:
    """Minimise the cross-entropy over [rows, F] of each expert; all experts are drawn equally often."""
    inputs = torch.cat(list(features))
    sizes = torch.tensor([len(rows) for rows in features])
    starts = sizes.cumsum(0) - sizes
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LEARNING_RATE)
    steps = max(_MIN_STEPS, _EPOCHS * len(inputs) // _BATCH_SIZE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
        targets = torch.randint(len(sizes), (_BATCH_SIZE,), generator=generator)
        rows = (torch.rand(_BATCH_SIZE, generator=generator) * sizes[targets]).long()
        logits = classifier(inputs[starts[targets] + rows])
        loss = functional.cross_entropy(logits, targets, label_smoothing=_LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # a joint run goes on with these parameters


def routing_accuracy(model: SparseExpertModel, examples: Sequence[Example], *, experts: Sequence[str]) -> float:
    """Return the share of rows whose best expert is one of ``experts``, 0 to 1."""
    logits, names = Route("gate", model).rows(examples).logits, model.text_gate().names
    assert logits is not None
    return sum(names[best] in experts for best in logits.argmax(-1).tolist()) / len(logits)
