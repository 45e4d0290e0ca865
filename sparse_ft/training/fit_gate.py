"""Fit a gate that routes whole texts to frozen experts.

The gate reads the means of the hidden states that enter the blocks up to one, by default the middle one, in the bare
backbone. They do not depend on the experts, so the gate is a classifier on fixed features.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Example
from sparse_ft.config import GateConfig
from sparse_ft.errors import ConfigError
from sparse_ft.experts.familiarity import DEFAULT_MIN_FAMILIARITY
from sparse_ft.experts.gates import TEXT_GATES, PrototypeGate, SequenceGate
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import named_generator
from sparse_ft.experts.selection import Selection
from sparse_ft.prediction.routes import Route
from sparse_ft.progress import progress_bar
from sparse_ft.training.text_groups import announce, distinct, joined, pairs_by_state, pairs_by_text, rivals

_EPOCHS, _MIN_STEPS, _BATCH_SIZE, _LEARNING_RATE = 10, 300, 128, 1e-3
_LABEL_SMOOTHING = 0.1


def fit_gate(
    model: SparseExpertModel,
    examples: Mapping[str, Sequence[Example]],
    *,
    settings: GateConfig,
    seed: int,
    names: Sequence[str] | None = None,
) -> SequenceGate:
    """Fit a gate over experts of a model; experts whose texts are the same or alike form a group.

    Args:
        model: In evaluation mode.
        examples: Training rows by expert; ``settings.rows`` of each, or of each group with the same texts, are drawn.
        settings: Gate settings of the run.
        seed: Seed of the drawn rows and of the perceptron.
        names: Experts of the gate; None takes all.

    Raises:
        ConfigError: If an expert has fewer than two rows.
    """
    names = list(names or model.routed)
    lacking = [name for name in names if len(examples.get(name, ())) < 2]
    if lacking:
        raise ConfigError(
            f"The gate needs texts of every expert, and {lacking[0]!r} has fewer than two. Name the data of its task "
            "with --data, or remove the expert."
        )
    block = gate_block(model, settings)
    choosable = rivals(model, names)
    same = pairs_by_text({name: examples[name] for name in choosable}, model.backbone.tokenizer)
    drawn = {}
    for lead, *others in joined(names, same):
        rows = distinct(examples, [lead, *others]) if others else examples[lead]
        drawn[lead] = _draw(rows, settings.rows, f"{seed}/{lead}")
    means = {
        lead: mean_states(model, rows, block=block, expert=model.trunk_expert, title=f"gate, {lead}")
        for lead, rows in drawn.items()
    }
    alike = pairs_by_state({lead: rows for lead, rows in means.items() if lead in choosable})
    groups = joined(names, [*same, *alike])
    announce(model, groups, [*same, *alike])
    tokens = {lead: [row.input_ids for row in rows] for lead, rows in drawn.items()}
    for lead, *others in groups:
        apart = [name for name in others if name in means]  # alike, not the same
        means[lead] = torch.cat([means[lead], *(means.pop(name) for name in apart)])
        tokens[lead] = [*tokens[lead], *(ids for name in apart for ids in tokens.pop(name))]
    gate = fit_on_means(means, tokens, settings=settings, seed=seed, names=names, groups=groups).to(model.device)
    gate.trunk_expert = model.trunk_expert
    return gate


def fit_on_means(
    means: Mapping[str, Tensor],
    tokens: Mapping[str, Sequence[Sequence[int]]],
    *,
    settings: GateConfig,
    seed: int,
    names: Sequence[str] | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> SequenceGate:
    """Fit a gate on mean hidden states.

    Args:
        means: [rows, blocks, H] for the first expert of each group, at least two rows: the means that enter the blocks
            up to the highest that the gate reads.
        tokens: Token ids of the same texts.
        settings: Gate settings of the run.
        seed: Seed of the perceptron.
        names: All experts, in the order of ``means`` where they lead a group; None takes those of ``means``.
        groups: Experts whose texts are the same or alike; ``means`` has all texts of a group under its first expert.
    """
    leads = list(means)
    _, num_blocks, hidden_size = means[leads[0]].shape
    selection = Selection.from_settings(settings, joint=False, min_confidence=DEFAULT_MIN_FAMILIARITY)
    gate = TEXT_GATES[settings.type](
        names or leads,
        hidden_size,
        block=num_blocks - 1,
        selection=replace(selection, top_k=min(selection.top_k, len(leads))),
        groups=groups,
    )
    gate.standardise(torch.cat([means[lead] for lead in leads]))
    features = [gate.features(means[lead]) for lead in leads]
    gate.familiarity.fit([gate.top_block_features(rows) for rows in features], [tokens[lead] for lead in leads])
    if isinstance(gate, PrototypeGate):
        gate.fit(features)
    else:
        generator = named_generator(seed, "gate")
        gate.initialise(generator)
        _fit_perceptron(gate, features, generator=generator)
    return gate.requires_grad_(False).eval()


def gate_block(model: SparseExpertModel, settings: GateConfig) -> int:
    """Return the highest 0-based block whose input a gate for texts reads."""
    middle = min(model.backbone.num_blocks // 2, model.backbone.num_blocks - 1)
    if model.trunk_expert is None or model.parting_block == 0:
        middle = max(model.parting_block, middle)
    else:
        middle = model.parting_block
    return middle if settings.block is None else settings.block


def _draw(examples: Sequence[Example], number: int, key: str) -> list[Example]:
    return random.Random(key).sample(list(examples), min(number, len(examples)))


def _fit_perceptron(gate: SequenceGate, features: Sequence[Tensor], *, generator: torch.Generator) -> None:
    """Minimise the cross-entropy over [rows, F] of each group; all groups are drawn equally often."""
    if len(features) < 2:
        return
    inputs = torch.cat(list(features))
    sizes = torch.tensor([len(rows) for rows in features])
    starts = sizes.cumsum(0) - sizes
    optimizer = torch.optim.AdamW(gate.classifier.parameters(), lr=_LEARNING_RATE)
    steps = max(_MIN_STEPS, _EPOCHS * len(inputs) // _BATCH_SIZE)
    with progress_bar("fitting the gate", total=steps, unit="step") as bar:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
            targets = torch.randint(len(sizes), (_BATCH_SIZE,), generator=generator)
            rows = (torch.rand(_BATCH_SIZE, generator=generator) * sizes[targets]).long()
            logits = gate.partition.logits(gate.classifier(inputs[starts[targets] + rows]))
            loss = functional.cross_entropy(logits, targets, label_smoothing=_LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    optimizer.zero_grad()  # a joint run goes on with these parameters


def routing_accuracy(model: SparseExpertModel, examples: Sequence[Example], *, experts: Sequence[str]) -> float:
    """Return the share of rows whose best group has one of ``experts``, 0 to 1."""
    gate, logits = model.text_gate(), Route("gate", model).rows(examples, title="scoring the gate").logits
    assert logits is not None
    right = {index for index, name in enumerate(gate.names) if name in experts}
    return sum(not right.isdisjoint(members) for members in gate.partition.best(logits)) / len(logits)
