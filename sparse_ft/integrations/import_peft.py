"""Import a LoRA that PEFT saved as a new checkpoint: its expert, and its head where a head here computes the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.backbone import Backbone, load_backbone
from sparse_ft.backbone.model_folder import MINILM_ID
from sparse_ft.checkpoint.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from sparse_ft.checkpoint.checkpoint import save_checkpoint
from sparse_ft.checkpoint.folders import damaged
from sparse_ft.checkpoint.foreign_adapters import read_adapter
from sparse_ft.checkpoint.manifest import MANIFEST, BackboneEntry, check_name
from sparse_ft.checkpoint.outputs import claimed_output
from sparse_ft.config import RunConfig
from sparse_ft.documents import read_json_object
from sparse_ft.errors import CheckpointError, ConfigError, ExportError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.integrations.export import RECORD
from sparse_ft.integrations.exporters.parts import empty_classifier
from sparse_ft.paths import user_path
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec, list_tasks, load_task, parse_task


@dataclass(frozen=True)
class Import:
    """The outcome of ``import_adapter``."""

    path: Path
    expert: str
    task: str | None
    """The task that the expert serves; None if the head could not be imported."""
    notes: list[str]
    """Sentences about parts that were left out or could not be checked."""


def import_adapter(
    adapter: str | Path,
    *,
    output: str | Path,
    task: str | None = None,
    labels: Sequence[str] = (),
    backbone: str | None = None,
) -> Import:
    """Write a checkpoint with the expert of a LoRA that PEFT saved, and its head.

    An adapter that ``export`` wrote comes back as it was, task included. Of other adapters, the head of a token
    classifier is imported, and the head of a causal backbone's text classifier (a linear on the last token). Other
    heads pool or compute in ways that heads here do not, and are left out.

    Args:
        adapter: Folder with adapter_config.json and adapter_model.safetensors.
        output: Folder to write; must be empty or not exist.
        task: Name of the task here, a bundled task, or the path of a task file, whose labels are taken. None takes the
            name of the folder.
        labels: Names of the head's outputs, in their order; empty takes those of config.json in the folder, or the
            task's.
        backbone: Where the backbone is; None takes the one that the adapter names.

    Raises:
        ConfigError: If a name is not allowed, labels do not fit the head, or the output exists.
        CheckpointError: If the folder is no plain LoRA for this backbone.
        BackboneError: If the backbone is not found.
    """
    folder = _adapter_folder(adapter)
    with claimed_output(output) as target:
        return _import(folder, target, task=task, labels=labels, backbone=backbone)


def _import(folder: Path, target: Path, *, task: str | None, labels: Sequence[str], backbone: str | None) -> Import:
    """Read the adapter of a folder and write a checkpoint; the arguments are those of ``import_adapter``."""
    config, record = read_adapter_config(folder), _read_record(folder / RECORD)
    where, sha256 = backbone or _named_backbone(config, folder), record.weights_sha256 if record else None
    loaded = load_backbone(where, revision=None if backbone else config.revision, expected_sha256=sha256)
    model = SparseExpertModel(loaded, pooling=record.pooling if record else "auto")
    given = load_task(task) if task is not None and (_is_file(task) or task in list_tasks()) else task
    called = given.name if isinstance(given, TaskSpec) else given
    name = _checked_name(called or (record.spec.name if record else folder.name))
    imported = read_adapter(folder, name=record.expert if record and task is None else name, backbone=loaded)
    model.experts.add(imported.expert)
    head = imported.head
    kind = (record.spec.kind if record else _kind(config, loaded, folder)) if head else None
    names = list(labels) or (_outputs(record.spec) if record else []) or _named_labels(folder)
    if record and not labels and not _is_file(task):
        spec = record.spec.model_copy(update={"name": name}) if head else None
    else:
        spec = _spec(name, given, names, kind=kind)
    if spec is not None:
        _add_task(model, spec, head, names=names, expert=imported.expert.name)
        notes = imported.remarks
    else:
        unnamed = [f"Its head has {len(head['weight'])} outputs; --labels may name them."] if kind else []
        notes = [*imported.notes, *unnamed]
    settings = {"backbone": loaded.name, "data": {"max_length": record.max_length} if record else {}}
    tasks = {} if spec is None else {spec.name: spec}
    save_checkpoint(target, model=model.eval(), tasks=tasks, config=RunConfig.model_validate(settings), metrics={})
    return Import(target, imported.expert.name, None if spec is None else spec.name, notes)


def _adapter_folder(adapter: str | Path) -> Path:
    """Return the folder of an adapter as a path, or raise which folder to name instead."""
    folder = user_path(adapter).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"Adapter folder {str(adapter)!r} does not exist. Give a folder that PEFT wrote.")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{str(adapter)!r} holds no {ADAPTER_CONFIG}. {_where_adapters_are(folder)}")
    return folder


def _where_adapters_are(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return "It is a checkpoint, which needs no import: `sparse-ft merge` and `edit --add` read it as it is."
    inside = sorted(str(file.parent) for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return f"Give one of {', '.join(inside)}." if inside else "Give a folder that PEFT wrote."


class _Record(NamedTuple):
    """The record that an export keeps of its checkpoint."""

    expert: str
    spec: TaskSpec
    pooling: str
    max_length: int
    weights_sha256: str


def _read_record(file: Path) -> _Record | None:
    """Read the record that ``export`` leaves beside an adapter; None if another program wrote the adapter."""
    record = _read_json(file)
    if record.get("format") != "peft":
        return None
    try:
        (entry,) = record["tasks"].values()
        spec = parse_task(entry["spec"], where=str(file))
        sha256 = BackboneEntry.model_validate(record["backbone"]).weights_sha256
        settings = {"data": {"max_length": record["max_length"]}, "experts": {"pooling": record["pooling"]}}
        run = RunConfig.model_validate(settings)  # raises ValueErrors
        return _Record(check_name(entry["expert"]), spec, run.experts.pooling, run.data.max_length, sha256)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {error!r}. Export the checkpoint again, or delete this file to import the "
            "adapter without it."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    """Read a file; empty if there is none."""
    return read_json_object(file, "it", error=partial(damaged, file)) if file.is_file() else {}


def _named_backbone(config: AdapterConfig, folder: Path) -> str:
    named = config.base_model_name_or_path
    if not named:
        raise ConfigError(f"The adapter {str(folder)!r} does not name its backbone. Name it with --backbone.")
    return "minilm" if named == MINILM_ID else str(named)


def _is_file(task: str | None) -> bool:
    return task is not None and task.endswith((".yaml", ".yml"))


def _checked_name(name: str) -> str:
    try:
        return check_name(name)
    except CheckpointError as error:
        raise ConfigError(f"{error} Choose one with --task NAME.") from error


def _named_labels(folder: Path) -> list[str]:
    """Return the names of labels in config.json; empty if they are transformers' placeholders (LABEL_0 …)."""
    by_id = _read_json(folder / "config.json").get("id2label") or {}
    try:
        names = [str(by_id[key]) for key in sorted(by_id, key=int)]
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"id2label in {str(folder / 'config.json')!r} is {by_id!r}. Expected a name for each number from 0. Name "
            "them with --labels."
        ) from error
    return [] if any(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _has_linear_head(backbone: Backbone) -> bool:
    """Return whether the head of transformers' token classifier for a backbone is a single linear."""
    try:
        empty_classifier(backbone.config)
    except ExportError:
        return False
    return True


def _kind(config: AdapterConfig, backbone: Backbone, folder: Path) -> str | None:
    """Return the kind of task whose head here computes the same as the adapter's, or None."""
    if config.task_type == "TOKEN_CLS" and _has_linear_head(backbone):
        return "token_classification"
    if config.task_type == "SEQ_CLS" and backbone.family.causal:
        problem = _read_json(folder / "config.json").get("problem_type")
        return "multi_label" if problem == "multi_label_classification" else "classification"
    return None


def _spec(name: str, given: TaskSpec | str | None, names: list[str], *, kind: str | None) -> TaskSpec | None:
    """Describe the task of a foreign head; None if no kind fits, or its labels are not known."""
    if kind is None:
        return None
    if isinstance(given, TaskSpec):
        if find_kind(given.kind).level != find_kind(kind).level:
            raise ConfigError(f"Task {given.name!r} is a {given.kind}, but the adapter is of a {kind}. Name another.")
        names.extend(_outputs(given) if not names else [])
        return given.model_copy(update={"labels": _labels(names, kind=kind)}) if not given.label_names else given
    if not names:
        return None
    metric = "f1" if kind == "token_classification" else "accuracy" if kind == "classification" else "micro_f1"
    values = {"name": name, "kind": kind, "labels": _labels(names, kind=kind), "metric": metric}
    return parse_task(values, where="--labels")


def _outputs(spec: TaskSpec) -> list[str]:
    return find_kind(spec.kind).outputs(spec.label_names or [])


def _labels(names: Sequence[str], *, kind: str) -> list[str]:
    """Return the labels of a task whose outputs have these names; for tags, the types of entities."""
    if kind != "token_classification":
        return list(names)
    return list(dict.fromkeys(tag[2:] for tag in names if tag != "O"))


def _add_task(
    model: SparseExpertModel, spec: TaskSpec, head: Mapping[str, Tensor], *, names: Sequence[str], expert: str
) -> None:
    """Give the model a task with the rows of a foreign head, in the order of the outputs here."""
    outputs, rows = _outputs(spec), len(head["weight"])
    if len(names) != rows:
        raise ConfigError(f"The head has {rows} outputs, but {len(names)} labels are named: {', '.join(names)}.")
    if sorted(names) != sorted(outputs):
        raise ConfigError(
            f"The labels {', '.join(names)} are not those of a {spec.kind} here, {', '.join(outputs)}. Name the "
            "outputs of the head, in its order, with --labels; tags must be O, and B- and I- of every type (IOB2)."
        )
    order = [list(names).index(name) for name in outputs]
    linear = model.add_task(spec.name, expert=expert, level=find_kind(spec.kind).level, num_outputs=rows).linear
    with torch.no_grad():
        linear.weight.copy_(head["weight"][order])
        linear.bias.copy_(head["bias"][order] if "bias" in head else torch.zeros(rows))
