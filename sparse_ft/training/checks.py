"""Refuse a run whose settings contradict each other, its checkpoint or its backbone, with all problems at once."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.checkpoint.outputs import free_output
from sparse_ft.config import RunConfig
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.gate_checks import check_token_routing
from sparse_ft.experts.heads import TaskSlot
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.selection import Selection
from sparse_ft.sections import Section
from sparse_ft.tasks.kinds import KINDS
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.joint import SHARED, has_gate, pool_names
from sparse_ft.training.new_experts import planned_slots
from sparse_ft.training.own_blocks import num_passes
from sparse_ft.training.parameters import frozen_experts


def check_stage(run: RunConfig, *, resume: bool) -> None:
    """Refuse a gate stage that cannot be assembled.

    Raises:
        ConfigError: With every problem in one paragraph.
    """
    problems = []
    if run.stage == "gate" and (run.tasks or resume):
        problems.append("--stage gate fits the gate over all tasks of --from; leave out --task and --resume.")
    if run.stage == "gate" and run.start is None:
        problems.append("--stage gate needs the checkpoint with the experts: add --from CHECKPOINT.")
    _refuse(problems)


def check_settings(run: RunConfig, trained: Sequence[str], *, output: str | Path | None) -> None:
    """Refuse everything that can be known before a model is loaded.

    Args:
        run: The config, with the settings that it takes over from its checkpoint.
        trained: Names of the tasks in training.
        output: Folder of the new checkpoint; None for the next free one.

    Raises:
        ConfigError: With every problem in one paragraph.
    """
    _refuse(
        [
            *(_name_problems(trained) if run.stage != "gate" else ()),
            *_start_problems(run, trained),
            *_setting_problems(run),
            *(_joint_setting_problems(run) if run.stage == "joint" else ()),
            *_shared_setting_problems(run, trained),
            *_messages(lambda: None if output is None else free_output(output)),
        ]
    )


def check_model(run: RunConfig, model: SparseExpertModel, specs: Sequence[TaskSpec]) -> None:
    """Refuse what the backbone, or the experts and tasks of the checkpoint, do not allow.

    Args:
        run: The run's config; only the settings of the user count as set.
        model: The model before the run adds experts and tasks.
        specs: Tasks in training.

    Raises:
        ConfigError: With every problem in one paragraph.
    """
    _refuse([
        f"Task {spec.name!r}: {unknown_name('kind', spec.kind, KINDS)}" for spec in specs if spec.kind not in KINDS
    ])  # fmt: skip
    trained = [spec.name for spec in specs]
    slots = {**model.tasks, **planned_slots(model, specs, run=run)}
    shared = {slot.shared for slot in slots.values()}
    names = {*model.experts.names, *(name for slot in slots.values() for name in slot.experts)}
    num_experts = run.experts.pool or len(names - shared)
    problems = [
        *_frozen_problems(run, model),
        *(_joint_problems(run, model, trained) if run.stage == "joint" else _stage_problems(run, model, trained)),
        *_shared_expert_problems(run, slots, trained, frozen=frozen_experts(run, model)),
        *_kept_expert_problems(run, model, trained),
        *_gate_problems(run, model, num_experts=num_experts),
        *(_shared_model_problems(run, model, trained) if run.stage == "shared" else ()),
        *(_own_block_problems(run, model, trained) if run.stage == "experts" else ()),
    ]
    if num_experts < 2 and has_gate(run):
        problems.append(
            "A joint run mixes at least 2 experts, and here is 1. Name more tasks, start --from a checkpoint with "
            "other experts, or set experts.pool."
        )
    _refuse(problems)


def check_gate_stage(run: RunConfig, model: SparseExpertModel) -> None:
    """Refuse to fit a gate on a checkpoint that needs none, or whose answers would change.

    Raises:
        ConfigError: With every problem in one paragraph.
    """
    problems = list(_gate_problems(run, model, num_experts=len(model.routed)))
    if len(model.routed) < 2:
        problems = [f"{run.start!r} has one expert, so there is nothing for a gate to choose."]
    joint = [task for task, slot in model.tasks.items() if slot.joint]
    if joint:
        problems.append(
            f"Task {joint[0]!r} of {run.start!r} was trained together with the gate; another gate would change its "
            "answers. Train both further with --stage joint."
        )
    idle = sorted(set(model.experts.names) - {name for slot in model.tasks.values() for name in slot.used})
    if idle:
        problems.append(
            f"The expert {idle[0]!r} of {run.start!r} serves no task, so there are no texts to send to it. Remove it "
            "with `sparse-ft edit`."
        )
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(" ".join(problems))


def _name_problems(names: Sequence[str]) -> Iterator[str]:
    if not names:
        yield "No task is given. Name at least one, e.g. --task ner; `sparse-ft tasks` lists them."
    if len(set(names)) < len(names):
        yield f"Two tasks have the same name: {', '.join(names)}. Give each task file its own name."


def _start_problems(run: RunConfig, trained: Sequence[str]) -> Iterator[str]:
    """Compare the config with the checkpoint to start from, which pools and cuts texts in its own way."""
    if run.start is None:
        return
    manifest, before = read_manifest(Path(run.start)), read_config(Path(run.start) / "config.yaml")
    if run.experts.pooling not in ("auto", manifest.pooling):
        yield (
            f"experts.pooling is {run.experts.pooling}, but the tasks of {run.start!r} pool by {manifest.pooling}. "
            "Leave it out."
        )
    others = [name for name in manifest.tasks if name not in trained]
    if run.data.max_length != before.data.max_length and others:
        yield (
            f"data.max_length is {run.data.max_length}, and {before.data.max_length} in {run.start!r}, so task "
            f"{others[0]!r} would read long texts otherwise. Leave it out, or train that task, too."
        )


def _setting_problems(run: RunConfig) -> Iterator[str]:
    settings = run.gate
    if settings.type == "token" and run.stage != "joint":
        yield "gate.type is token, which is trained together with the experts: use --stage joint."
    if settings.type != "token" and settings.shortlist is not None:
        yield f"gate.shortlist is for tokens, but gate.type is {settings.type}. Leave it out."
    if settings.type == "token" and settings.min_confidence:
        yield "gate.min_confidence turns away whole texts, but gate.type is token. Leave it out."
    for name in ("shared", "shared_a"):
        if run.stage != "joint" and getattr(run.experts, name):
            yield f"experts.{name} is for experts that are trained jointly. Add --stage joint."
    if run.experts.frozen and run.experts.shared_a:
        yield (
            "experts.shared_a ties the A of all experts of the pool, so none can stay as it is. Leave experts.frozen "
            "out."
        )
    for name in run.experts.frozen if run.start is None else ():
        yield (
            f"Nothing to keep: {name!r} has not been trained. experts.frozen names experts of a checkpoint to start "
            "--from."
        )


def _joint_setting_problems(run: RunConfig) -> Iterator[str]:
    settings, top_k = run.gate, Selection.from_settings(run.gate, joint=True).top_k
    if settings.type == "prototype":
        yield "gate.type is prototype, which learns nothing. A joint run takes sequence or token."
    if settings.shortlist is not None and settings.shortlist < top_k:
        yield (
            f"gate.shortlist is {settings.shortlist}, but each token goes through gate.top_k={top_k} experts of it. "
            "Raise it."
        )
    if settings.shortlist is not None and settings.capacity is not None:
        yield "gate.capacity counts over all experts, so it cannot be set with gate.shortlist."
    if run.experts.shared_a and not run.experts.pool:
        yield "experts.shared_a needs a pool: set experts.pool to the number of its experts."


def _changed(section: Section) -> set[str]:
    """Return the settings of a section that are not at their defaults; a saved config names all of them."""
    return {name for name, value in type(section)() if value != getattr(section, name)}


def _shared_setting_problems(run: RunConfig, trained: Sequence[str]) -> Iterator[str]:
    settings = run.shared
    if run.stage != "shared":
        adds = run.stage == "experts" and run.start is not None
        for name in _changed(settings) - ({"own_blocks"} if adds else set()):
            yield f"shared.{name} applies to --stage shared and `sparse-ft distill` only. Remove it, or add the stage."
        return
    if run.start is not None:
        yield (
            "--stage shared begins with new experts, so --from has no meaning. `sparse-ft distill CHECKPOINT` takes "
            "the experts of a checkpoint as teachers."
        )
    for name in ("pool", "frozen", "first_block"):
        if name in _changed(run.experts):
            yield f"Stage shared does not take experts.{name}: all tasks share the lower blocks. Remove it."
    if SHARED in trained:
        yield f"A task cannot be named {SHARED!r}, which is the name of the expert that all tasks share. Rename it."


def _shared_model_problems(run: RunConfig, model: SparseExpertModel, trained: Sequence[str]) -> Iterator[str]:
    settings, num_blocks = run.shared, model.backbone.num_blocks
    yield from _own_block_problems(run, model, trained)
    if not model.backbone.family.routes_rows:
        yield (
            f"Backbone {model.backbone.name!r} cannot share a pass between tasks: its attention shares layers between "
            "rows. Train one expert per task (--stage experts)."
        )
    passes = num_passes({name: settings.own_blocks.get(name, 0) for name in trained}, num_blocks=num_blocks)
    if passes > settings.passes + 1e-9:
        yield (
            f"shared.own_blocks costs {passes:.2f} passes for all tasks, and shared.passes is {settings.passes:g}. "
            f"Raise shared.passes (--passes) to {math.ceil(100 * passes) / 100:g}, or give fewer blocks."
        )


def _own_block_problems(run: RunConfig, model: SparseExpertModel, trained: Sequence[str]) -> Iterator[str]:
    new, num_blocks = [name for name in trained if name not in model.tasks], model.backbone.num_blocks
    for name, blocks in run.shared.own_blocks.items():
        if name not in new:
            yield f"shared.own_blocks: {unknown_name('new task', name, new)}"
        elif not 0 <= blocks <= num_blocks:
            yield (
                f"shared.own_blocks gives task {name!r} {blocks} blocks; the backbone has {num_blocks}. Give 0 to "
                f"{num_blocks}."
            )
        elif run.stage == "experts" and model.trunk_expert is None:
            yield f"The tasks of {run.start!r} share no expert, so shared.own_blocks has no meaning. Remove it."


def _gate_problems(run: RunConfig, model: SparseExpertModel, *, num_experts: int) -> Iterator[str]:
    block, top_k, last = run.gate.block, run.gate.top_k, model.backbone.num_blocks - 1
    if block is not None and block > last:
        yield f"gate.block is {block}, but the blocks are 0 to {last}. Choose one of them."
    if top_k is not None and top_k > num_experts:
        yield f"gate.top_k is {top_k}, but there are {num_experts} experts. Lower it."
    if run.gate.type == "token":
        yield from _messages(lambda: check_token_routing(model.backbone))


def _frozen_problems(run: RunConfig, model: SparseExpertModel) -> Iterator[str]:
    for name in run.experts.frozen:
        if name not in model.experts.names:
            unknown = unknown_name("expert", name, model.experts.names)
            yield f"{unknown} experts.frozen names experts of a checkpoint to start --from."


def _stage_problems(run: RunConfig, model: SparseExpertModel, trained: Sequence[str]) -> Iterator[str]:
    for task in trained:
        if task in model.tasks and model.tasks[task].joint:
            yield (
                f"Task {task!r} of {run.start!r} was trained together with its gate. Train it further with --stage "
                "joint."
            )


def _joint_problems(run: RunConfig, model: SparseExpertModel, trained: Sequence[str]) -> Iterator[str]:
    left = [name for name, slot in model.tasks.items() if slot.gated and name not in trained]
    if left:
        yield (
            f"Task {left[0]!r} of {run.start!r} is answered through the same gate, so its answers would change. Train "
            f"it, too: add --task {run.start}/tasks/{left[0]}.yaml, or leave --task out to train all of the checkpoint."
        )
    if model.trunk_expert is not None:
        yield (
            f"The tasks of {run.start!r} share the expert {model.trunk_expert!r} below their own. A joint run starts "
            "from one expert per task, such as those that taught this checkpoint."
        )
    pool = pool_names(run.experts.pool)
    for name in [*pool, *([SHARED] if run.experts.shared else [])]:
        for task, slot in model.tasks.items():
            if name in slot.experts and not slot.joint and slot.experts != tuple(pool):
                yield (
                    f"The expert {name!r} of {run.start!r} serves task {task!r}, so it cannot be one that tasks share. "
                    f"Rename it: sparse-ft edit {run.start} --rename {name}=NEW."
                )
    existing = [model.experts.get(name) for name in pool if name in model.experts.names]
    for expert in existing[1:] if run.experts.shared_a else ():
        pairs = zip(existing[0].deltas.values(), expert.deltas.values(), strict=True)
        if not all(torch.equal(first[0], other[0]) for first, other in pairs):
            yield (
                f"The experts {existing[0].name!r} and {expert.name!r} of {run.start!r} were trained without "
                "experts.shared_a, so each has its own A. Leave it out."
            )
            return
    if run.experts.shared_a and existing and len(existing) < len(pool):
        yield f"{run.start!r} has {len(existing)} experts with one A, so experts.pool cannot be {len(pool)}."


def _shared_expert_problems(
    run: RunConfig, slots: Mapping[str, TaskSlot], trained: Sequence[str], *, frozen: Collection[str]
) -> Iterator[str]:
    """Refuse to train an expert that also serves a task which is not trained."""
    for task in trained:
        for other, slot in slots.items():
            common = sorted(set(slot.used) & set(slots[task].used) - set(frozen))
            if other not in trained and common:
                yield (
                    f"The expert {common[0]!r} of task {task!r} in {run.start!r} also serves task {other!r}, whose "
                    f"answers would change. Train it, too: add --task {other}; or give the task an expert of its own: "
                    f"sparse-ft edit {run.start} --copy {common[0]}=NEW."
                )


def _kept_expert_problems(run: RunConfig, model: SparseExpertModel, trained: Sequence[str]) -> Iterator[str]:
    """Refuse settings of experts in a run that only trains existing experts further."""
    if run.experts.pool or any(task not in model.tasks for task in trained):
        return  # the settings are for the new experts
    for name in dict.fromkeys(name for task in trained for name in model.tasks[task].experts):
        expert = model.experts.get(name)
        values: dict[str, list[float]] = {
            "rank": sorted(set(expert.ranks.values())),
            "alpha": [expert.alpha],
            "first_block": [min((model.backbone.block_of(module) for module in expert.deltas), default=0)],
        }
        for key, existing in values.items():
            requested = getattr(run.experts, key)
            if key in run.experts.model_fields_set and existing != [requested]:
                yield (
                    f"experts.{key} is {requested}, but the expert {name!r} of {run.start!r}, which is trained "
                    f"further, has {' and '.join(map(str, existing))}. Leave the setting out, or train a new expert."
                )


def _messages(check: Callable[[], object]) -> list[str]:
    """Return the message of a check that raises."""
    try:
        check()
    except ConfigError as error:
        return [str(error)]
    return []
