"""What a run that starts from a checkpoint takes over from it, where its own config says nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.config import RunConfig, changed_config
from sparse_ft.errors import ConfigError
from sparse_ft.experts.model import SparseExpertModel


def continued_config(run: RunConfig) -> RunConfig:
    """Take over the backbone, the settings of the gate, and in a joint run those of a pool with one A.

    Args:
        run: With ``start``.

    Raises:
        ConfigError: If texts would be pooled otherwise than the checkpoint does.
        CheckpointError: If ``start`` is no complete checkpoint.
    """
    assert run.start is not None
    manifest, before = read_manifest(Path(run.start)), read_config(Path(run.start) / "config.yaml")
    if run.experts.pooling not in ("auto", manifest["pooling"]):
        raise ConfigError(
            f"experts.pooling is {run.experts.pooling}, but the tasks of {run.start!r} pool by {manifest['pooling']}. "
            "Leave it out."
        )
    values: dict[str, Any] = {"gate": _gate(run, before)}
    if "backbone" not in run.model_fields_set:
        values |= {"backbone": manifest["backbone"]["name"], "revision": manifest["backbone"]["revision"]}
    own = run.experts.model_fields_set
    if run.stage == "joint" and before.experts.shared_a and not own & {"pool", "shared_a"}:
        tied = {"pool": before.experts.pool, "shared_a": True}
        values["experts"] = {**run.experts.model_dump(exclude_unset=True), **tied}
    return changed_config(run, values)


def _gate(run: RunConfig, before: RunConfig) -> dict[str, Any]:
    """Return the settings of the gate: the run's own, and those of the checkpoint if it is a gate of the same type."""
    own, old = run.gate.model_dump(exclude_unset=True), before.gate.model_dump(exclude_unset=True)
    suits = old.get("type", "sequence") in (
        ("sequence", "token") if run.stage == "joint" else ("sequence", "prototype")
    )
    if not suits or own.get("type", old.get("type", "sequence")) != old.get("type", "sequence"):
        return own
    return {**old, **own}


def check_kept_experts(model: SparseExpertModel, tasks: Sequence[str], *, run: RunConfig) -> None:
    """Refuse settings of experts that a run which only trains experts of its checkpoint further cannot heed.

    Args:
        model: As the checkpoint has it.
        tasks: Of the run.
        run: Its config, in which only what was asked for counts as set.

    Raises:
        ConfigError: If an expert is otherwise than asked.
    """
    if run.experts.pool or any(task not in model.tasks for task in tasks):
        return  # they are for the new ones
    for name in dict.fromkeys(name for task in tasks for name in model.tasks[task].used):
        expert = model.experts.get(name)
        blocks = [model.backbone.block_of(module) for module in expert.deltas]
        has: dict[str, list[float]] = {
            "rank": sorted(set(expert.ranks.values())),
            "alpha": [expert.alpha],
            "first_block": [min(blocks, default=0)],
        }
        for key, own in has.items():
            asked = getattr(run.experts, key)
            if key in run.experts.model_fields_set and own != [asked]:
                raise ConfigError(
                    f"experts.{key} is {asked}, but the expert {name!r} of {run.start!r}, which is trained further, "
                    f"has {' and '.join(str(value) for value in own)}. Leave the setting out, or train a new expert."
                )


def moved_backbone(run: RunConfig) -> str | None:
    """Return where the checkpoint's backbone is now, if not where its manifest says."""
    assert run.start is not None
    named = read_manifest(Path(run.start))["backbone"]["name"]
    return None if run.backbone == named else run.backbone


def keep_length(run: RunConfig, trained: Sequence[str]) -> RunConfig:
    """Cut texts where the checkpoint to start from does, for the sake of its tasks that are not trained.

    Args:
        run: The run's config.
        trained: Tasks of this run.

    Raises:
        ConfigError: If another length is asked for and would change other tasks.
    """
    if run.start is None:
        return run
    before = read_config(Path(run.start) / "config.yaml").data.max_length
    if "max_length" not in run.data.model_fields_set:
        data = {**run.data.model_dump(exclude_unset=True), "max_length": before}
        return changed_config(run, {"data": data})
    kept = [name for name in read_manifest(Path(run.start))["tasks"] if name not in trained]
    if run.data.max_length != before and kept:
        raise ConfigError(
            f"data.max_length is {run.data.max_length}, and {before} in {run.start!r}, so task {kept[0]!r} would read "
            "long texts otherwise. Leave it out, or train that task, too."
        )
    return run
