"""Add experts from elsewhere to a checkpoint: those of another checkpoint, or a LoRA that PEFT saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sparse_ft.backbone.encoding import PROBE_TEXTS
from sparse_ft.checkpoint.adapter_config import ADAPTER_CONFIG
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_task_into
from sparse_ft.checkpoint.expert_files import load_expert
from sparse_ft.checkpoint.foreign_adapters import read_adapter
from sparse_ft.checkpoint.manifest import MANIFEST, Manifest, read_config, read_manifest, read_metrics
from sparse_ft.errors import CheckpointError, ConfigError, unknown_name
from sparse_ft.merging.bookkeeping import (
    check_new_names,
    drop_gate,
    listed_tasks,
    new_task_names,
    scores_without_gate,
    set_sources,
)
from sparse_ft.paths import user_path
from sparse_ft.tasks.kinds import find_kind


class NamedExperts(NamedTuple):
    """The experts of a checkpoint that a path names."""

    checkpoint: Path
    experts: list[str]


def add_from(checkpoint: Checkpoint, path: str | Path, *, as_name: str | None = None) -> list[str]:
    """Add experts from elsewhere, and return sentences about what was done.

    Args:
        checkpoint: Changed in place.
        path: A checkpoint, for all its experts with their tasks; ``CHECKPOINT/experts/NAME``, for one; or the folder of
            a LoRA that PEFT saved, which brings no task.
        as_name: New name of the expert, and of its tasks as with ``copy_expert``. None keeps all names; a LoRA of PEFT
            is named like its folder.

    Raises:
        ConfigError: If a name is taken or not allowed.
        CheckpointError: If the folder is none of the three, or its experts do not fit this backbone.
    """
    folder = user_path(path).absolute()
    named = find_experts(folder)
    if named is not None:
        if as_name is not None and len(named.experts) > 1:
            raise ConfigError(
                f"{str(path)!r} holds {len(named.experts)} experts ({', '.join(named.experts)}), which cannot all be "
                f"named {as_name!r}. Name one by its folder, {str(Path(path) / 'experts' / named.experts[0])!r}."
            )
        return _add_saved(checkpoint, named.checkpoint, {name: as_name or name for name in named.experts})
    if (folder / ADAPTER_CONFIG).is_file():
        return _add_foreign(checkpoint, folder, as_name or folder.name)
    problem = f"holds neither {MANIFEST} nor {ADAPTER_CONFIG}" if folder.is_dir() else "does not exist"
    raise CheckpointError(
        f"{str(path)!r} {problem}. Give a checkpoint, one of its experts (CHECKPOINT/experts/NAME), or a LoRA folder "
        "that PEFT wrote."
    )


def find_experts(path: str | Path) -> NamedExperts | None:
    """Return the experts that a path names: all of ``CHECKPOINT``, or one, ``CHECKPOINT/experts/NAME``.

    Returns:
        None if the path is neither.

    Raises:
        ConfigError: If the checkpoint has no expert of that name.
        CheckpointError: If the checkpoint is damaged.
    """
    folder = user_path(path).absolute()
    parent = folder.parent.parent
    if folder.parent.name == "experts" and (parent / MANIFEST).is_file():
        experts = read_manifest(parent).experts
        if folder.name not in experts:
            raise ConfigError(unknown_name(f"expert of {str(parent)!r}", folder.name, experts))
        return NamedExperts(parent, [folder.name])
    return NamedExperts(folder, list(read_manifest(folder).experts)) if (folder / MANIFEST).is_file() else None


def _add_saved(checkpoint: Checkpoint, path: Path, names: Mapping[str, str]) -> list[str]:
    """Add experts of the checkpoint at ``path`` with their tasks; ``names`` maps their names there to those here."""
    model, manifest = checkpoint.model, read_manifest(path)
    _check_backbone(checkpoint, path, manifest)
    _check_lone_experts(path, manifest, names)
    _check_tokenizer(checkpoint, path)
    tasks: dict[str, str] = {}
    for old, new in names.items():
        served = [task for task, entry in manifest.tasks.items() if entry.served_by == [old]]
        tasks |= {task: task for task in served} if old == new else new_task_names(served, expert=old, new=new)
    _check_pooling(checkpoint, path, manifest, tasks)
    advice = f" NAME={path / 'experts' / next(iter(names))} gives an expert, and the task that it serves, another name."
    check_new_names(checkpoint, experts=list(names.values()), tasks=list(tasks.values()), advice=advice)
    model.experts.add(*(load_expert(path, old, entry=manifest.experts[old], as_name=new) for old, new in names.items()))
    for task, new in tasks.items():
        entry = manifest.tasks[task]
        checkpoint.tasks[new] = load_task_into(model, path, task, entry=entry, as_name=new, renamed=names)
    with_tasks = f", which serve{'s' if len(names) == 1 else ''} {listed_tasks(tasks.values())}" if tasks else ""
    return [
        f"Added {', '.join(repr(name) for name in names.values())} from {str(path)!r}{with_tasks}.",
        *_take_over_scores(checkpoint, path, tasks),
        *drop_gate(checkpoint),
    ]


def _take_over_scores(checkpoint: Checkpoint, path: Path, tasks: Mapping[str, str]) -> list[str]:
    """Copy sources of tasks, and their scores if texts are cut at the same length; else say so."""
    config, metrics = read_config(path / "config.yaml"), read_metrics(path)
    set_sources(checkpoint, {new: config.sources.get(task) for task, new in tasks.items()})
    length, length_there = checkpoint.config.data.max_length, config.data.max_length
    if tasks and length != length_there:
        return [
            f"Texts are cut at {length} tokens here and were at {length_there} there, so their scores were not taken "
            "over."
        ]
    for task, new in tasks.items():
        if task in metrics:
            checkpoint.metrics[new] = scores_without_gate(metrics[task])
    return []


def _check_backbone(checkpoint: Checkpoint, path: Path, manifest: Manifest) -> None:
    theirs, ours = manifest.backbone, checkpoint.model.backbone
    if theirs.weights_sha256 != ours.weights_sha256:
        raise CheckpointError(
            f"The experts of {str(path)!r} were trained on the backbone {theirs.name!r} (sha256 "
            f"{theirs.weights_sha256[:12]}…), not on {ours.name!r} ({ours.weights_sha256[:12]}…). Train them anew "
            "on this one."
        )


def _check_lone_experts(path: Path, manifest: Manifest, names: Mapping[str, str]) -> None:
    """Refuse experts of which a task needs several."""
    for task, entry in manifest.tasks.items():
        shared, mixes = entry.shared, entry.mixed or len(entry.served_by) > 1
        taken = sorted(set(entry.used) & set(names))
        if taken and (mixes or shared):
            how = "the gate there mixing several experts" if mixes else f"the shared expert {shared!r} in it"
            raise CheckpointError(
                f"Task {task!r} of {str(path)!r} was trained with {how}, so {taken[0]!r} cannot serve it alone. Train "
                "the task anew here."
            )


def _check_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse experts that were trained on other tokens of the same texts."""
    file, tokenizer = path / "tokenizer" / "tokenizer.json", checkpoint.model.backbone.tokenizer.backend_tokenizer
    if not file.is_file():
        return
    pair = (type(tokenizer).from_file(str(file)), type(tokenizer).from_str(tokenizer.to_str()))
    for each in pair:
        each.no_truncation()
        each.no_padding()
    theirs, ours = ([(row.ids, row.offsets) for row in each.encode_batch(list(PROBE_TEXTS))] for each in pair)
    if theirs != ours:
        raise CheckpointError(
            f"The experts of {str(path)!r} were trained on the same backbone, but with another tokenizer than those of "
            f"{str(checkpoint.path)!r}: the same text gives other tokens. Train them anew with one of the two."
        )


def _check_pooling(checkpoint: Checkpoint, path: Path, manifest: Manifest, tasks: Mapping[str, str]) -> None:
    on_texts = [task for task in tasks if find_kind(manifest.tasks[task].kind).level == "text"]
    if on_texts and manifest.pooling != checkpoint.model.pooling:
        raise CheckpointError(
            f"The head of task {on_texts[0]!r} in {str(path)!r} reads {manifest.pooling} pooling; this checkpoint "
            f"has {checkpoint.model.pooling}. Train the task anew with `sparse-ft train --from {checkpoint.path}`."
        )
    if on_texts and manifest.by_words != checkpoint.model.by_words:
        here, there = (
            "split into words" if words else "unsplit" for words in (checkpoint.model.by_words, manifest.by_words)
        )
        raise CheckpointError(
            f"Task {on_texts[0]!r} of {str(path)!r} reads texts {there}, and this checkpoint reads them {here}, so it "
            f"would see other tokens. Train the task anew with `sparse-ft train --from {checkpoint.path}`."
        )


def _add_foreign(checkpoint: Checkpoint, folder: Path, name: str) -> list[str]:
    """Add a LoRA that PEFT saved."""
    check_new_names(checkpoint, experts=[name], advice=f" Choose one with --add NAME={folder}.")
    adapter = read_adapter(folder, name=name, backbone=checkpoint.model.backbone)
    checkpoint.model.experts.add(adapter.expert)
    ranks = adapter.expert.ranks.values()
    return [
        f"Added {name!r} from {str(folder)!r}: rank {max(ranks)} on {len(ranks)} layers. It has no head, so no task "
        "(`sparse-ft import` reads those of token classifiers).",
        *adapter.notes,
        *drop_gate(checkpoint),
    ]
