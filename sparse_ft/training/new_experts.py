"""The experts, tasks and gate that a run adds to the model before it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparse_ft.backbone.encoding import Example
from sparse_ft.config import GateConfig, RunConfig
from sparse_ft.experts.familiarity import DEFAULT_MIN_FAMILIARITY
from sparse_ft.experts.gates import SequenceGate, TokenGate
from sparse_ft.experts.heads import TaskSlot
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import named_generator
from sparse_ft.experts.selection import Selection
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.fit_gate import fit_gate, gate_block
from sparse_ft.training.joint import SHARED, has_gate, pool_names
from sparse_ft.training.shared_experts import shared_alpha
from sparse_ft.training.training_task import TrainingTask

_MANY_EXPERTS = 16
"""Above this number of experts, a token gate gets a shortlist by default."""
_SHORTLIST = 4
"""Length of the default shortlist."""


def planned_slots(model: SparseExpertModel, specs: Sequence[TaskSpec], *, run: RunConfig) -> dict[str, TaskSlot]:
    """Return the slot that each task of a run will have; a task that the model has already keeps its experts.

    Args:
        model: The model before the run.
        specs: Tasks in training.
        run: The run's config.
    """
    pool, slots = tuple(pool_names(run.experts.pool)), {}
    for spec in specs:
        slot = model.tasks.get(spec.name) or TaskSlot(
            pool or (spec.name,), find_kind(spec.kind).level, shared=_trunk(model, run)
        )
        if run.stage == "joint":
            shared = SHARED if run.experts.shared else slot.shared
            slot = replace(slot, experts=pool or slot.experts, joint=has_gate(run), shared=shared)
        slots[spec.name] = slot
    return slots


def _trunk(model: SparseExpertModel, run: RunConfig) -> str | None:
    """Return the expert that new tasks share below their own, if there is one."""
    return {"shared": SHARED, "experts": model.trunk_expert}.get(run.stage)


def add_tasks(model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, run: RunConfig) -> None:
    """Add the experts and heads that a run needs; those that the model has already stay."""
    specs = [task.spec for task in tasks.values()]
    slots = planned_slots(model, specs, run=run)
    words = any(slot.level == "word" for slot in slots.values())
    if run.stage == "shared":
        num_blocks = model.backbone.num_blocks
        rank, alpha, own_blocks = run.shared.rank, shared_alpha(run), run.shared.own_blocks
        common = range(num_blocks - min(own_blocks[spec.name] for spec in specs))
        _create(model, SHARED, run=run, words=words, blocks=common, rank=rank, alpha=alpha)
    for name in pool_names(run.experts.pool):
        if name not in model.experts.names:
            _create(model, name, run=run, words=words, drawn_as="pool" if run.experts.shared_a else None)
    if run.stage == "joint" and run.experts.shared and SHARED not in model.experts.names:
        _create(model, SHARED, run=run, words=words)
    for spec in specs:
        if spec.name not in model.tasks:
            _add_task(model, spec, slots[spec.name], run=run)
        model.tasks[spec.name] = slots[spec.name]
        model.head(spec.name).dropout = run.train.head_dropout


def _add_task(model: SparseExpertModel, spec: TaskSpec, slot: TaskSlot, *, run: RunConfig) -> None:
    if slot.shared is not None and run.stage in ("shared", "experts"):
        num_blocks = model.backbone.num_blocks
        own = range(num_blocks - run.shared.own_blocks.get(spec.name, 1), num_blocks)
        _create(model, spec.name, run=run, words=False, blocks=own)
    elif not run.experts.pool:
        _create(model, spec.name, run=run, words=slot.level == "word")
    outputs = find_kind(spec.kind).outputs(spec.label_names or [])
    head = model.add_task(
        spec.name, expert=slot.experts, level=slot.level, num_outputs=len(outputs), shared=slot.shared
    )
    head.initialise(seed=run.seed, name=spec.name)


def _create(
    model: SparseExpertModel,
    name: str,
    *,
    run: RunConfig,
    words: bool,
    drawn_as: str | None = None,
    blocks: range | None = None,
    rank: int | None = None,
    alpha: float | None = None,
) -> None:
    """Add an expert by the settings of a run, except for what is given."""
    settings, backbone = run.experts, model.backbone
    shapes = backbone.drops_case if settings.word_shapes is None else settings.word_shapes
    modules = backbone.select_linears(first_block=settings.first_block, targets=settings.targets)
    model.experts.create(
        name,
        modules=[module for module in modules if blocks is None or backbone.block_of(module) in blocks],
        rank=rank or settings.rank,
        alpha=alpha or settings.alpha,
        seed=run.seed,
        word_shapes=shapes and words,
        drawn_as=drawn_as,
    )


def start_gate(
    model: SparseExpertModel,
    tasks: Mapping[str, TrainingTask],
    examples: Mapping[str, list[Example]],
    *,
    run: RunConfig,
) -> SequenceGate | TokenGate:
    """Return the gate that a joint run begins with.

    A token gate continues from the checkpoint's gate, or begins at random. A sequence gate is first fitted on the texts
    of each expert; it begins at random if an expert has none.

    Args:
        model: On its device, with all its experts.
        tasks: Tasks in training.
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
        gate = _random_gate(model, names, tasks, run=run)
    threshold = DEFAULT_MIN_FAMILIARITY if gate.familiarity.fitted else 0.0
    gate.selection = Selection.from_settings(run.gate, joint=True, min_confidence=threshold)
    return gate


def token_gate(model: SparseExpertModel, names: Sequence[str], *, settings: GateConfig, seed: int) -> TokenGate:
    """Build a token gate, with the weights of the model's gate if that has the same experts."""
    before, shortlist = model.token_gate, settings.shortlist
    selection = Selection.from_settings(settings, joint=True)
    if shortlist is None and len(names) > _MANY_EXPERTS and settings.capacity is None:
        shortlist = max(_SHORTLIST, selection.top_k)
    blocks = range(model.first_block, model.backbone.num_blocks)
    gate = TokenGate(names, model.backbone.hidden_size, blocks=blocks, selection=selection, shortlist=shortlist)
    if before is not None and before.names == gate.names and before.blocks == gate.blocks:
        gate.load_state_dict(before.state_dict())
    else:
        gate.initialise(named_generator(seed, "gate"))
    return gate.to(model.device)


def _random_gate(
    model: SparseExpertModel, names: list[str], tasks: Mapping[str, TrainingTask], *, run: RunConfig
) -> SequenceGate:
    block = gate_block(model, run.gate)
    selection = Selection.from_settings(run.gate, joint=True)
    gate = SequenceGate(names, model.backbone.hidden_size, block=block, selection=selection)
    rows = [example for task in tasks.values() for example in task.examples[: run.gate.rows]]
    gate.standardise(mean_states(model, rows, block=block))
    gate.initialise(named_generator(run.seed, "gate"))
    return gate.to(model.device)
