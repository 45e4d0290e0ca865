"""The life of an expert after training: remove, rename, copy, add, prune, split. No other task changes."""

import copy as copying
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ft.backbone.encoding import PROBE_TEXTS
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint, load_task_into, save_checkpoint
from sparse_ft.checkpoint.expert_files import ADAPTER_CONFIG, load_expert, read_adapter
from sparse_ft.checkpoint.folders import recover_folder
from sparse_ft.checkpoint.manifest import MANIFEST, check_name, read_config, read_manifest, read_metrics, slot_experts
from sparse_ft.checkpoint.outputs import free_output
from sparse_ft.errors import CheckpointError, ConfigError, unknown_name
from sparse_ft.merging.low_rank import Pruned, prune
from sparse_ft.merging.split import split_expert
from sparse_ft.tasks.kinds import find_kind


@dataclass(frozen=True)
class Edit:
    """What ``edit`` did."""

    path: Path
    changes: list[str]
    """One or more sentences a change, in the order in which they were made."""


class FoundExperts(NamedTuple):
    """Experts that a path names."""

    home: Path
    """Their checkpoint."""
    experts: list[str]


def edit(
    checkpoint: str | Path,
    *,
    output: str | Path,
    remove: Sequence[str] | str = (),
    rename: Sequence[tuple[str, str]] = (),
    copy: Sequence[tuple[str, str]] = (),
    add: Sequence[tuple[str | None, str | Path]] = (),
    prune: Sequence[tuple[str, int]] = (),
    split: Sequence[tuple[str, str]] = (),
    backbone: str | None = None,
) -> Edit:
    """Change the experts of a checkpoint and write the outcome as a new one; the old one stays as it is.

    The changes are made in the order of the arguments, and each sees the names that those before it left.

    Args:
        checkpoint: Folder to read.
        output: Folder to write; must be empty or not exist.
        remove: Experts to remove, with the tasks that they serve.
        rename: (old, new) names of experts; their tasks keep their names.
        copy: (expert, name of the copy); see ``copy_expert``.
        add: (name here or None for its own, path); see ``add_from``.
        prune: (expert, rank); see ``prune_expert``.
        split: (expert, name of the second half); see ``split_expert``.
        backbone: Where the backbone is now, if not where the checkpoint says.

    Raises:
        ConfigError: If nothing is asked for, a name is unknown or taken, or the output exists.
        CheckpointError: If a folder is no checkpoint or does not fit this one.
    """
    if not (remove or rename or copy or add or prune or split):
        raise ConfigError(
            "No change is asked for. Give at least one --remove, --rename, --copy, --add, --prune or --split."
        )
    folder = free_output(output)
    loaded = load_checkpoint(checkpoint, backbone=backbone)
    changes = []
    for name in [remove] if isinstance(remove, str) else remove:
        changes.extend(remove_expert(loaded, name))
    for old, new in rename:
        changes.extend(rename_expert(loaded, old, new))
    for old, new in copy:
        changes.extend(copy_expert(loaded, old, new))
    for as_name, path in add:
        changes.extend(add_from(loaded, path, as_name=as_name))
    for name, rank in prune:
        changes.extend(_prune_and_say(loaded, name, rank))
    for name, new in split:
        _check_new(loaded, [new], [])
        changes.extend(split_expert(loaded, name, new))
    save_checkpoint(folder, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)
    return Edit(folder, changes)


def remove_expert(checkpoint: Checkpoint, name: str) -> list[str]:
    """Remove an expert and the tasks that it serves, with their heads and scores.

    Returns:
        What was done, in sentences.

    Raises:
        ConfigError: If there is no such expert, it is the last one, or a task that stays mixes it in.
    """
    model = checkpoint.model
    model.experts.index(name)
    if len(model.experts.names) == 1:
        raise ConfigError(
            f"{name!r} is the last expert of {str(checkpoint.path)!r}; a checkpoint holds at least one. Keep it, or "
            "delete the folder."
        )
    served = [task for task, slot in model.tasks.items() if slot.experts == (name,)]
    left = [task for task in _tasks_of(checkpoint, name) if task not in served]
    if left:
        raise ConfigError(
            f"Task {left[0]!r} was trained with the gate mixing {name!r} in, so it would answer otherwise without. "
            "Train it anew without this expert."
        )
    for task in served:
        model.remove_task(task)
        del checkpoint.tasks[task]
        checkpoint.metrics.pop(task, None)
    _set_sources(checkpoint, dict.fromkeys(served))
    model.experts.remove(name)
    with_tasks = f", and with it {_named(served)}" if served else "; it served no task"
    return [f"Removed expert {name!r}{with_tasks}.", *_drop_gate(checkpoint)]


def rename_expert(checkpoint: Checkpoint, old: str, new: str) -> list[str]:
    """Give an expert another name; its tasks keep theirs, and a gate goes on choosing it.

    Returns:
        What was done, in sentences.

    Raises:
        ConfigError: If there is no such expert, or the new name is taken or not allowed.
    """
    model = checkpoint.model
    model.experts.index(old)
    _check_new(checkpoint, [new], [])
    model.experts.rename(old, new)
    served = [task for task, slot in model.tasks.items() if old in slot.used]
    for task, slot in model.tasks.items():
        experts = tuple(new if name == old else name for name in slot.experts)
        model.tasks[task] = replace(slot, experts=experts, shared=new if slot.shared == old else slot.shared)
    if model.gate is not None:
        model.gate.names = [new if name == old else name for name in model.gate.names]
    return [f"Renamed expert {old!r} to {new!r}" + (f"; it serves {_named(served)}." if served else ".")]


def copy_expert(checkpoint: Checkpoint, old: str, new: str) -> list[str]:
    """Copy an expert with its task, head and scores.

    ``ner=ner2`` gives an expert ``ner2`` and a task ``ner2`` that it serves. Of an expert with several tasks, the one
    that has its name gets the new name; the others get theirs behind it, ``ner2_other``. An expert without a task of
    its own is copied alone.

    Returns:
        What was done, in sentences.

    Raises:
        ConfigError: If there is no such expert, or a new name is taken or not allowed.
    """
    model = checkpoint.model
    expert = model.experts.get(old)
    served = [task for task, slot in model.tasks.items() if slot.experts == (old,) and not slot.joint]
    names = new_task_names(served, expert=old, new=new)
    _check_new(checkpoint, [new], list(names.values()))
    model.experts.add(replace(expert, name=new))
    for task, copied in names.items():
        spec, head = checkpoint.tasks[task], model.head(task)
        checkpoint.tasks[copied] = spec.model_copy(update={"name": copied})
        slot, outputs = model.tasks[task], head.linear.out_features
        twin = model.add_task(copied, expert=new, level=slot.level, num_outputs=outputs, shared=slot.shared)
        twin.load_state_dict(head.state_dict())
        if task in checkpoint.metrics:
            checkpoint.metrics[copied] = _own_scores(checkpoint.metrics[task])
    _set_sources(checkpoint, {copied: checkpoint.config.sources.get(task) for task, copied in names.items()})
    with_tasks = f", which serves {_named(names.values())}" if names else "; it serves no task"
    return [f"Copied expert {old!r} to {new!r}{with_tasks}.", *_drop_gate(checkpoint)]


def prune_expert(checkpoint: Checkpoint, name: str, rank: int) -> Pruned:
    """Lower the rank of an expert; the scores of its tasks are dropped, for they are no longer true.

    Returns:
        The expert as it is now, and how far that is from what it was.

    Raises:
        ConfigError: If there is no such expert, or the rank is below 1 or above what it has.
    """
    pruned = prune(checkpoint.model.experts.get(name), rank)
    checkpoint.model.experts.replace(pruned.expert)
    checkpoint.model.requires_grad_(False)
    for task in _tasks_of(checkpoint, name):
        checkpoint.metrics.pop(task, None)
    return pruned


def add_from(checkpoint: Checkpoint, path: str | Path, *, as_name: str | None = None) -> list[str]:
    """Add experts from elsewhere.

    Args:
        checkpoint: To add to.
        path: A checkpoint, for all its experts with their tasks; ``CHECKPOINT/experts/NAME``, for one of them; or the
            folder of a LoRA that PEFT saved, which brings no task.
        as_name: The expert's name here; a task of its own gets it, too, as with ``copy_expert``. None keeps all names;
            a LoRA of PEFT has that of its folder.

    Returns:
        What was done, in sentences.

    Raises:
        ConfigError: If a name is taken or not allowed.
        CheckpointError: If the folder is neither, or its experts do not fit this backbone.
    """
    folder = Path(path).expanduser().absolute()
    found = find_experts(folder)
    if found is not None:
        if as_name is not None and len(found.experts) > 1:
            raise ConfigError(
                f"{str(path)!r} holds {len(found.experts)} experts ({', '.join(found.experts)}), which cannot all be "
                f"named {as_name!r}. Name one by its folder, {str(Path(path) / 'experts' / found.experts[0])!r}."
            )
        return _add_saved(checkpoint, found.home, {name: as_name or name for name in found.experts})
    if (folder / ADAPTER_CONFIG).is_file():
        return _add_foreign(checkpoint, folder, as_name or folder.name)
    problem = f"holds neither {MANIFEST} nor {ADAPTER_CONFIG}" if folder.is_dir() else "does not exist"
    raise CheckpointError(
        f"{str(path)!r} {problem}. Give a checkpoint, one expert of it (CHECKPOINT/experts/NAME), or a LoRA folder "
        "that PEFT wrote."
    )


def find_experts(path: str | Path) -> FoundExperts | None:
    """Say which experts of which checkpoint a path names: all of ``CHECKPOINT``, or one, ``CHECKPOINT/experts/NAME``.

    Returns:
        None if it names neither.

    Raises:
        ConfigError: If the checkpoint has no expert of that name.
        CheckpointError: If the checkpoint is damaged.
    """
    folder = Path(path).expanduser().absolute()
    recover_folder(folder)
    home = folder.parent.parent
    if folder.parent.name == "experts" and (home / MANIFEST).is_file():
        experts = read_manifest(home)["experts"]
        if folder.name not in experts:
            raise ConfigError(unknown_name(f"expert of {str(home)!r}", folder.name, experts))
        return FoundExperts(home, [folder.name])
    return FoundExperts(folder, list(read_manifest(folder)["experts"])) if (folder / MANIFEST).is_file() else None


def _add_saved(checkpoint: Checkpoint, path: Path, names: Mapping[str, str]) -> list[str]:
    """Add experts of another checkpoint with their tasks; ``names`` maps those there to those here."""
    model, manifest = checkpoint.model, read_manifest(path)
    theirs, ours = manifest["backbone"], model.backbone
    if theirs["weights_sha256"] != ours.weights_sha256:
        raise CheckpointError(
            f"The experts of {str(path)!r} were trained on the backbone {theirs['name']!r} (sha256 "
            f"{theirs['weights_sha256'][:12]}…), not on {ours.name!r} ({ours.weights_sha256[:12]}…). Train them anew "
            "on this one."
        )
    for task, entry in manifest["tasks"].items():
        experts, shared = slot_experts(entry), entry.get("shared")
        mixes = entry.get("mixed") or len(experts) > 1
        taken = sorted({*experts, shared} & set(names))
        if taken and (mixes or shared):
            how = "the gate there mixing several experts" if mixes else f"the shared expert {shared!r} in it"
            raise CheckpointError(
                f"Task {task!r} of {str(path)!r} was trained with {how}, so {taken[0]!r} cannot serve it alone. Train "
                "the task anew here."
            )
    _check_tokenizer(checkpoint, path)
    tasks: dict[str, str] = {}
    for old, new in names.items():
        served = [task for task, entry in manifest["tasks"].items() if slot_experts(entry) == [old]]
        tasks |= {task: task for task in served} if old == new else new_task_names(served, expert=old, new=new)
    reads_texts = [task for task in tasks if find_kind(manifest["tasks"][task]["kind"]).level == "text"]
    if reads_texts and manifest["pooling"] != model.pooling:
        raise CheckpointError(
            f"The head of task {reads_texts[0]!r} in {str(path)!r} reads {manifest['pooling']} pooling; this "
            f"checkpoint has {model.pooling}. Train the task anew with `sparse-ft train --from {checkpoint.path}`."
        )
    advice = f" NAME={path / 'experts' / next(iter(names))} gives an expert, and the task that it serves, another name."
    _check_new(checkpoint, list(names.values()), list(tasks.values()), advice=advice)
    model.experts.add(*(load_expert(path / "experts" / old, name=new) for old, new in names.items()))
    config, metrics = read_config(path / "config.yaml"), read_metrics(path)
    same_length = config.data.max_length == checkpoint.config.data.max_length
    for task, new in tasks.items():
        experts = [names[expert] for expert in slot_experts(manifest["tasks"][task])]
        checkpoint.tasks[new] = load_task_into(model, path, task, experts=experts, as_name=new)
        if same_length and task in metrics:
            checkpoint.metrics[new] = _own_scores(metrics[task])
    _set_sources(checkpoint, {new: config.sources.get(task) for task, new in tasks.items()})
    serve = "serves" if len(names) == 1 else "serve"
    with_tasks = f", which {serve} {_named(tasks.values())}" if tasks else ""
    changes = [f"Added {', '.join(repr(name) for name in names.values())} from {str(path)!r}{with_tasks}."]
    if tasks and not same_length:
        changes.append(
            f"Texts are cut at {checkpoint.config.data.max_length} tokens here and were at {config.data.max_length} "
            "there, so their scores were not taken over."
        )
    return [*changes, *_drop_gate(checkpoint)]


def _check_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse experts that were trained on other tokens of the same texts."""
    file, own = path / "tokenizer" / "tokenizer.json", checkpoint.model.backbone.tokenizer.backend_tokenizer
    if not file.is_file():
        return
    pair = (type(own).from_file(str(file)), type(own).from_str(own.to_str()))
    for tokenizer in pair:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    theirs, ours = ([(row.ids, row.offsets) for row in tokenizer.encode_batch(list(PROBE_TEXTS))] for tokenizer in pair)
    if theirs != ours:
        raise CheckpointError(
            f"The experts of {str(path)!r} were trained on the same backbone, but with another tokenizer than those of "
            f"{str(checkpoint.path)!r}: the same text gives other tokens. Train them anew with one of the two."
        )


def _add_foreign(checkpoint: Checkpoint, folder: Path, name: str) -> list[str]:
    _check_new(checkpoint, [name], [], advice=f" Choose one with --add NAME={folder}.")
    found = read_adapter(folder, name=name, backbone=checkpoint.model.backbone)
    checkpoint.model.experts.add(found.expert)
    ranks = found.expert.ranks.values()
    return [
        f"Added {name!r} from {str(folder)!r}: rank {max(ranks)} on {len(ranks)} layers. It has no head, so no task "
        "(`sparse-ft import` reads those of token classifiers).",
        *found.notes,
        *_drop_gate(checkpoint),
    ]


def _prune_and_say(checkpoint: Checkpoint, name: str, rank: int) -> list[str]:
    scored = [task for task in _tasks_of(checkpoint, name) if task in checkpoint.metrics]
    pruned = prune_expert(checkpoint, name, rank)
    changes = [
        f"Pruned expert {name!r} to rank {rank}. Relative error of its deltas: {pruned.error:.4f} in all; by layer:",
        *(f"  {error:.4f}  {module}" for module, error in pruned.errors.items()),
    ]
    if scored:
        changes.append(f"The scores of {_named(scored)} are dropped; `sparse-ft evaluate` measures them anew.")
    return changes


def _own_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the scores of a task, but for that of a gate, which does not know the new expert."""
    return {name: copying.deepcopy(value) for name, value in scores.items() if name != "routing_accuracy"}


def _tasks_of(checkpoint: Checkpoint, expert: str) -> list[str]:
    """Return the tasks whose answers an expert has a part in."""
    gate = checkpoint.model.gate
    chosen = gate is not None and expert in gate.names
    return [task for task, slot in checkpoint.model.tasks.items() if expert in slot.used or (slot.joint and chosen)]


def new_task_names(tasks: Sequence[str], *, expert: str, new: str) -> dict[str, str]:
    """Name the tasks that follow an expert to a new name: the only one, or that of its name, is called as it is."""
    return {task: new if task == expert or len(tasks) == 1 else f"{new}_{task}" for task in tasks}


def _named(tasks: Iterable[str]) -> str:
    names = [repr(task) for task in tasks]
    return f"task{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _check_new(checkpoint: Checkpoint, experts: Sequence[str], tasks: Sequence[str], *, advice: str = "") -> None:
    """Refuse names that are taken or may not be file names, before anything is changed."""
    known = (("expert", experts, checkpoint.model.experts.names), ("task", tasks, list(checkpoint.tasks)))
    for what, names, taken in known:
        for name in names:
            try:
                check_name(name)
            except CheckpointError as error:
                raise ConfigError(f"{error}{advice}") from error
            if name in taken:
                raise ConfigError(
                    f"There is {'an' if what == 'expert' else 'a'} {what} named {name!r} already: {', '.join(taken)}. "
                    "Choose another name, or remove or rename that one." + advice
                )


def _set_sources(checkpoint: Checkpoint, sources: Mapping[str, str | None]) -> None:
    """Change where the data of tasks is, which `evaluate` looks up; None forgets it."""
    changed = {**checkpoint.config.sources, **sources}
    kept = {task: source for task, source in changed.items() if source is not None}
    checkpoint.config = checkpoint.config.model_copy(update={"sources": kept})


def _drop_gate(checkpoint: Checkpoint) -> list[str]:
    """Let go of a gate that chose among other experts than there are now, and of its scores; unless tasks need it."""
    checkpoint.model.eval().requires_grad_(False)
    gated = [task for task, slot in checkpoint.model.tasks.items() if slot.gated]
    if gated:
        return [f"The gate is kept as it is, for {_named(gated)}; it does not know other experts than before."]
    for scores in checkpoint.metrics.values():
        scores.pop("routing_accuracy", None)
    if checkpoint.model.gate is None:
        return []
    checkpoint.model.gate = None
    return [
        "The gate is dropped, because it chose among other experts; `sparse-ft train --stage gate --from` fits one."
    ]
