"""What a run adds to the model before it trains: an expert a task, or a pool that tasks share, and the gate on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sparse_ft.backbone.encoding import Example
from sparse_ft.config import GateConfig, RunConfig
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.gates import SequenceGate, TokenGate
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import named_generator
from sparse_ft.experts.selection import Selection
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.fit_gate import fit_gate, gate_block
from sparse_ft.training.joint import SHARED, has_gate, pool_names
from sparse_ft.training.training_task import TrainingTask

_MANY = 16
"""Above so many experts, tokens choose from a shortlist by default, of …"""
_SHORT = 4


def add_tasks(model: SparseExpertModel, ready: Mapping[str, TrainingTask], *, run: RunConfig) -> None:
    """Give every task of a run its experts and its head; those that the model has already keep theirs."""
    joint = run.stage == "joint"
    _check_frozen(model, run=run)
    left = [name for name, slot in model.tasks.items() if slot.gated and name not in ready]
    if joint and left:
        raise ConfigError(
            f"Task {left[0]!r} of {run.start!r} is answered through the same gate, so its answers would change. Train "
            f"it, too: add --task {run.start}/tasks/{left[0]}.yaml, or leave --task out to train all of the checkpoint."
        )
    specs = [task.spec for task in ready.values()]
    words = any(find_kind(spec.kind).level == "word" for spec in specs)
    shared = SHARED if joint and run.experts.shared else None
    common = [*pool_names(run.experts.pool), *([] if shared is None else [shared])]
    for name in common:
        pool = tuple(pool_names(run.experts.pool))
        slots = model.tasks.items()
        taken = [task for task, slot in slots if name in slot.experts and not slot.joint and slot.experts != pool]
        if taken:
            raise ConfigError(
                f"The expert {name!r} of {run.start!r} serves task {taken[0]!r}, so it cannot be one that tasks share. "
                f"Rename it: sparse-ft edit {run.start} --rename {name}=NEW."
            )
        if name not in model.experts.names:
            pooled = name != shared and run.experts.shared_a
            _create(model, name, run=run, words=words, drawn_as="pool" if pooled else None)
    if run.experts.pool and run.experts.shared_a:
        _check_shared_a(model, run=run)
    for spec in specs:
        if spec.name not in model.tasks:
            _add_task(model, spec, run=run)
        if joint:
            slot = model.tasks[spec.name]
            experts = tuple(pool_names(run.experts.pool)) or slot.experts
            mixed, added = has_gate(run), shared or slot.shared
            model.tasks[spec.name] = replace(slot, experts=experts, joint=mixed, shared=added)
        elif model.tasks[spec.name].joint:
            raise ConfigError(
                f"Task {spec.name!r} of {run.start!r} was trained together with its gate. Train it further with "
                "--stage joint."
            )
        model.head(spec.name).dropout = run.train.head_dropout
    _check_shared(model, list(ready), run=run)


def _check_frozen(model: SparseExpertModel, *, run: RunConfig) -> None:
    """Refuse to freeze what has not been trained: an expert that is not there yet."""
    for name in run.experts.frozen:
        if name not in model.experts.names:
            where = "experts.frozen names experts of a checkpoint to start --from."
            known = (
                unknown_name("expert", name, model.experts.names)
                if run.start
                else f"Nothing to keep: {name!r} has not been trained."
            )
            raise ConfigError(f"{known} {where}")
    if run.experts.frozen and run.experts.shared_a:
        raise ConfigError(
            "experts.shared_a ties the A of all experts of the pool, so none can stay as it is. Leave experts.frozen "
            "out."
        )


def _check_shared(model: SparseExpertModel, trained: Sequence[str], *, run: RunConfig) -> None:
    """Refuse to train an expert that also serves a task whose head would stay as it is."""
    for task in trained:
        for other, slot in model.tasks.items():
            common = sorted(set(slot.used) & set(model.tasks[task].used) - set(run.experts.frozen))
            if other not in trained and common:
                raise ConfigError(
                    f"The expert {common[0]!r} of task {task!r} in {run.start!r} also serves task {other!r}, whose "
                    f"answers would change. Train it, too: add --task {other}; or give the task an expert of its own: "
                    f"sparse-ft edit {run.start} --copy {common[0]}=NEW."
                )


def _add_task(model: SparseExpertModel, spec: TaskSpec, *, run: RunConfig) -> None:
    kind = find_kind(spec.kind)
    expert = pool_names(run.experts.pool) or spec.name
    if isinstance(expert, str):
        _create(model, expert, run=run, words=kind.level == "word")
    outputs = kind.outputs(spec.label_names or [])
    head = model.add_task(spec.name, expert=expert, level=kind.level, num_outputs=len(outputs))
    head.initialise(seed=run.seed, name=spec.name)


def _create(model: SparseExpertModel, name: str, *, run: RunConfig, words: bool, drawn_as: str | None = None) -> None:
    settings = run.experts
    shapes = model.backbone.drops_case if settings.word_shapes is None else settings.word_shapes
    model.experts.create(
        name,
        modules=model.backbone.select_linears(first_block=settings.first_block, targets=settings.targets),
        rank=settings.rank,
        alpha=settings.alpha,
        seed=run.seed,
        word_shapes=shapes and words,
        drawn_as=drawn_as,
    )


def _check_shared_a(model: SparseExpertModel, *, run: RunConfig) -> None:
    """Refuse a pool of a checkpoint whose experts have no A in common."""
    first, *others = [model.experts.get(name) for name in pool_names(run.experts.pool)]
    for other in others:
        pairs = zip(first.deltas.values(), other.deltas.values(), strict=True)
        if not all(torch.equal(own[0], theirs[0]) for own, theirs in pairs):
            raise ConfigError(
                f"The experts {first.name!r} and {other.name!r} of {run.start!r} were trained without "
                "experts.shared_a, so each has an A of its own. Leave it out."
            )


def start_gate(
    model: SparseExpertModel,
    ready: Mapping[str, TrainingTask],
    examples: Mapping[str, list[Example]],
    *,
    run: RunConfig,
) -> SequenceGate | TokenGate:
    """Return the gate that a joint run begins with.

    A token gate goes on from the checkpoint's, or begins at random. A sequence gate is fitted on the frozen experts'
    texts first, if there are some of each; without, it begins at random, too.

    Args:
        model: On its device, with all its experts.
        ready: The tasks that are trained.
        examples: Training rows by expert.
        run: The run's config.
    """
    names = pool_names(run.experts.pool) or model.routed
    if run.gate.type == "token":
        return token_gate(model, names, settings=run.gate, seed=run.seed)
    before = model.gate
    gate: SequenceGate
    if type(before) is SequenceGate and before.names == names and run.gate.block in (None, before.block):
        gate = before
    elif set(names) <= set(examples):
        gate = fit_gate(model, examples, names=names, settings=run.gate, seed=run.seed)
    else:
        gate = _random_gate(model, names, ready, run=run)
    gate.selection = Selection.from_settings(run.gate, joint=True)
    return gate


def token_gate(model: SparseExpertModel, names: Sequence[str], *, settings: GateConfig, seed: int) -> TokenGate:
    """Build a token gate, or go on with the one that the model has for the same experts."""
    before = model.token_gate
    selection = Selection.from_settings(settings, joint=True)
    shortlist = settings.shortlist
    if shortlist is None and len(names) > _MANY and settings.capacity is None:
        shortlist = max(_SHORT, selection.top_k)
    blocks = range(model.first_block, model.backbone.num_blocks)
    gate = TokenGate(names, model.backbone.hidden_size, blocks=blocks, selection=selection, shortlist=shortlist)
    if before is not None and before.names == gate.names and before.blocks == gate.blocks:
        gate.load_state_dict(before.state_dict())
    else:
        gate.initialise(named_generator(seed, "gate"))
    return gate.to(model.device)


def _random_gate(
    model: SparseExpertModel, names: list[str], ready: Mapping[str, TrainingTask], *, run: RunConfig
) -> SequenceGate:
    block = gate_block(model, run.gate)
    selection = Selection.from_settings(run.gate, joint=True)
    gate = SequenceGate(names, model.backbone.hidden_size, block=block, selection=selection)
    rows = [example for task in ready.values() for example in task.examples[: run.gate.rows]]
    gate.standardise(mean_states(model, rows, block=block))
    gate.initialise(named_generator(run.seed, "gate"))
    return gate.to(model.device)
