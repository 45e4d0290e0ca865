"""The checkpoint: a folder with experts, heads, gate and tasks; it names its backbone and does not contain it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sparse_ft.backbone.backbone import fresh_tokenizer, load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.expert_files import check_numbers, load_expert, read_tensors, save_expert
from sparse_ft.checkpoint.folders import damaged, replace_folder, write_bytes, write_json
from sparse_ft.checkpoint.inventory import hash_file, list_files
from sparse_ft.checkpoint.manifest import (
    FORMAT,
    GATE,
    MANIFEST,
    Manifest,
    TaskEntry,
    TextGateEntry,
    check_name,
    parse_manifest,
    read_config,
    read_manifest,
    read_metrics,
    read_spec,
)
from sparse_ft.config import RunConfig
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.gates import SequenceGate, TokenGate, build_gate, describe_gate
from sparse_ft.experts.heads import TaskSlot
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.paths import user_path
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import UNRECORDED, TaskSpec
from sparse_ft.version import __version__
from sparse_ft.yaml_schema import yaml_text

MODEL_TYPE = "sparse-ft"
"""``model_type`` in config.json, by which transformers' pipelines find this project's module."""


@dataclass
class Checkpoint:
    """A checkpoint in memory, ready to run."""

    path: Path
    model: SparseExpertModel
    tasks: dict[str, TaskSpec]
    """Task files with all label names filled in."""
    config: RunConfig
    """Config of the run that wrote it last."""
    metrics: dict[str, Any]
    """Per task: the best validation score, and the scores after training."""
    manifest: Manifest

    @property
    def encoder(self) -> Encoder:
        """A new encoder of texts, as the checkpoint's tasks read them."""
        return self.model.text_encoder(self.config.data.max_length)


def save_checkpoint(
    path: Path,
    *,
    model: SparseExpertModel,
    tasks: Mapping[str, TaskSpec],
    config: RunConfig,
    metrics: Mapping[str, Any],
) -> None:
    """Write a checkpoint; an existing folder is replaced as a whole, or not at all.

    Raises:
        CheckpointError: If the disk is full or not writable; an existing folder is then untouched.
    """

    def fill(folder: Path) -> None:
        experts = {}
        for name in model.experts.names:
            expert = model.experts.get(name)
            save_expert(folder / "experts" / check_name(name), expert, backbone=model.backbone)
            rank = max(expert.ranks.values(), default=0)
            experts[name] = {"rank": rank, "alpha": expert.alpha, "layers": len(expert.ranks)}
        for task, spec in tasks.items():
            write_bytes(folder / "heads" / f"{check_name(task)}.safetensors", _weights(model.head(task)))
            unrecorded = {"division"} if spec.division == UNRECORDED else None
            content = spec.model_dump(exclude_defaults=True, exclude=unrecorded)
            write_bytes(folder / "tasks" / f"{task}.yaml", _yaml(content))
        if model.gate is not None:
            write_bytes(folder / GATE, _weights(model.gate))
        write_bytes(folder / "config.yaml", _yaml(config.model_dump()))
        write_json(folder / "config.json", {"model_type": MODEL_TYPE})
        write_json(folder / "metrics.json", metrics)
        fresh_tokenizer(model.backbone.tokenizer).save_pretrained(folder / "tokenizer")
        write_json(folder / MANIFEST, _manifest(folder, model=model, experts=experts, tasks=tasks))

    replace_folder(path, fill)


def _weights(module: torch.nn.Module) -> bytes:
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    return safetensors.torch.save(state)


def _yaml(content: Any) -> bytes:
    return yaml_text(content).encode()


def _manifest(
    folder: Path, *, model: SparseExpertModel, experts: Mapping[str, Any], tasks: Mapping[str, TaskSpec]
) -> dict[str, Any]:
    files = {file.relative_to(folder).as_posix(): file for file in list_files(folder)}
    values = {
        "format": FORMAT,
        **describe_origin(model),
        "first_block": model.first_block,
        "pooling": model.pooling,
        **({"by_words": True} if model.by_words else {}),
        **({"passes": model.plan({name: spec.reads for name, spec in tasks.items()}).passes} if tasks else {}),
        "experts": experts,
        "tasks": {task: {**_describe_slot(model.tasks[task]), "kind": spec.kind} for task, spec in tasks.items()},
        "gate": None if model.gate is None else describe_gate(model.gate),
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        "sha256": {name: hash_file(file) for name, file in files.items()},
    }
    parse_manifest(values, folder / MANIFEST)  # nothing is written that could not be read
    return values


def describe_origin(model: SparseExpertModel) -> dict[str, Any]:
    """Return the versions that write a file, and the backbone that the file belongs to."""
    import transformers

    backbone = model.backbone
    return {
        "versions": {"sparse_ft": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "backbone": {
            "name": backbone.name,
            "revision": backbone.revision,
            "weights_sha256": backbone.weights_sha256,
            "num_blocks": backbone.num_blocks,
        },
    }


def _describe_slot(slot: TaskSlot) -> dict[str, Any]:
    """Return the entry of a task in the manifest, with ``mixed`` and ``shared`` only for tasks that have them."""
    experts = {"expert": slot.experts[0]} if len(slot.experts) == 1 else {"experts": list(slot.experts)}
    return {**experts, **({"mixed": True} if slot.joint else {}), **({"shared": slot.shared} if slot.shared else {})}


def _load_gate(path: Path, manifest: Manifest, model: SparseExpertModel) -> SequenceGate | TokenGate | None:
    """Read the gate, whose sizes must be those of its file and of the backbone before memory is taken for them."""
    entry, backbone = manifest.gate, model.backbone
    if entry is None:
        return None
    tensors = read_tensors(path / GATE)
    blocks = [entry.block] if isinstance(entry, TextGateEntry) else entry.blocks
    if max(blocks) >= backbone.num_blocks:
        raise damaged(path / MANIFEST, f"its gate reads block {max(blocks)} of {backbone.num_blocks}")
    if isinstance(entry, TextGateEntry) and entry.pairs != tensors.get("familiarity.pairs", torch.empty(0)).numel():
        raise damaged(path / MANIFEST, f"its gate has {entry.pairs} pairs of tokens, {GATE} has others")
    try:
        gate = build_gate(entry.model_dump(), backbone.hidden_size)
    except ValueError as error:
        raise damaged(path / MANIFEST, f"its gate cannot be built: {error}") from error
    _load_into(gate, tensors, path / GATE, what="the experts that it chooses among")
    return gate


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    backbone: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Load a checkpoint and its backbone.

    Args:
        path: Folder that ``train`` wrote.
        device: Device of the model.
        backbone: Name or folder of the backbone if it has moved since; the hash of its weights must agree.
        dtype: Type of the frozen weights.

    Raises:
        CheckpointError: If the folder is no complete checkpoint of a known format.
        BackboneError: If the backbone is not found, or its weights are not those of the training.
    """
    checkpoint = load_bare(path, backbone=backbone, dtype=dtype)
    path, model, manifest = checkpoint.path, checkpoint.model, checkpoint.manifest
    model.experts.add(*(load_expert(path, name, entry=entry) for name, entry in manifest.experts.items()))
    tasks = {task: load_task_into(model, path, task, entry=entry) for task, entry in manifest.tasks.items()}
    if model.trunk_expert is not None:
        model.experts.fold(model.trunk_expert)
    if model.first_block != manifest.first_block:
        raise damaged(
            path / MANIFEST, f"its first_block is {manifest.first_block}, that of its experts is {model.first_block}"
        )
    model.gate = _load_gate(path, manifest, model)
    model.to(device).eval().requires_grad_(False)
    return replace(checkpoint, tasks=tasks, metrics=read_metrics(path))


def load_bare(path: str | Path, *, backbone: str | None = None, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load the backbone and settings of a checkpoint, without experts, tasks, gate and scores.

    The arguments and errors are those of ``load_checkpoint``; the model is on the CPU.
    """
    path = user_path(path)
    manifest = read_manifest(path)
    named = manifest.backbone
    loaded = load_backbone(
        backbone or named.name,
        revision=None if backbone else named.revision,
        expected_sha256=named.weights_sha256,
        tokenizer_folder=path / "tokenizer",
        dtype=dtype,
    )
    if named.num_blocks not in (None, loaded.num_blocks):
        raise damaged(
            path / MANIFEST, f"its backbone has {named.num_blocks} blocks, and {named.name!r} {loaded.num_blocks}"
        )
    model = SparseExpertModel(loaded, pooling=manifest.pooling, by_words=manifest.by_words).eval().requires_grad_(False)
    config = read_config(path / "config.yaml")
    return Checkpoint(path, model, {}, config, {}, manifest)


def load_task_into(
    model: SparseExpertModel,
    path: Path,
    task: str,
    *,
    entry: TaskEntry,
    as_name: str | None = None,
    renamed: Mapping[str, str] | None = None,
) -> TaskSpec:
    """Add a task of a checkpoint to a model, with its head.

    Args:
        model: Model that has the task's experts.
        path: Folder of the checkpoint.
        task: Name of the task in the checkpoint.
        entry: The task in its manifest.
        as_name: Name of the task in ``model``, if another.
        renamed: Experts of the task to their names in ``model``, if others.
    """
    file = path / "tasks" / f"{check_name(task)}.yaml"
    spec = read_spec(file).model_copy(update={"name": as_name or task})
    if spec.kind != entry.kind:
        raise damaged(file, f"its kind is {spec.kind!r}, {MANIFEST} says {entry.kind!r}")
    kind = find_kind(spec.kind)
    size = len(kind.outputs(spec.label_names or []))
    experts = [(renamed or {}).get(expert, expert) for expert in entry.served_by]
    head = model.add_task(
        spec.name, expert=experts, level=kind.level, num_outputs=size, joint=entry.mixed, shared=entry.shared
    )
    weights = path / "heads" / f"{task}.safetensors"
    tensors = read_tensors(weights)
    for name, tensor in tensors.items():
        check_numbers(weights, name, tensor)
    _load_into(head, tensors, weights, what="the labels of its task")
    return spec


def _load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path, *, what: str) -> None:
    """Load weights of the same names, shapes and data types as those of a module."""
    expected = {name: (value.dtype, value.shape) for name, value in module.state_dict().items()}
    for name, value in tensors.items():
        if name in expected and (value.dtype, value.shape) != expected[name]:
            dtype, shape = expected[name]
            raise CheckpointError(
                f"{str(path)!r} does not fit {what}: {name} is {value.dtype} {tuple(value.shape)}, expected {dtype} "
                f"{tuple(shape)}."
            )
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(f"{str(path)!r} does not fit {what}: {' '.join(str(error).split())}") from error
