"""The files of an expert: a PEFT adapter, and word shapes beside it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.model_folder import MINILM_ID
from sparse_ft.checkpoint.adapter_config import ADAPTER_CONFIG, read_adapter_config
from sparse_ft.checkpoint.folders import damaged, write_bytes, write_json
from sparse_ft.checkpoint.manifest import ExpertEntry, check_name
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.named_experts import Expert

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WORD_SHAPES = "word_shapes.safetensors"
_WRAPPER = "base_model.model."
"""Prefix of every tensor in PEFT's files."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Data types that an expert may have in its file."""
_LARGEST = 1e6
"""Largest number in the file of an expert or head; those of trained ones are below 100."""


class AdapterTensors(NamedTuple):
    """The tensors of a PEFT adapter; names are without PEFT's prefix."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    """Module name to (A [r, I], B [O, r])."""
    others: dict[str, Tensor]
    """All other tensors, e.g. of a head."""


def read_adapter_tensors(folder: Path) -> AdapterTensors:
    """Read adapter_model.safetensors.

    Raises:
        CheckpointError: If the file is missing or damaged, a matrix lacks its counterpart or does not fit it, or a
            tensor holds no floating-point numbers.
    """
    file = folder / ADAPTER_WEIGHTS
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    others = {}
    for key, tensor in read_tensors(file).items():
        check_numbers(file, key, tensor)
        module, separator, side = key.removeprefix(_WRAPPER).removesuffix(".weight").rpartition(".lora_")
        if not separator or side not in sides:
            others[key.removeprefix(_WRAPPER)] = tensor
        elif module in sides[side]:
            raise damaged(file, f"it has {side} of {module!r} twice")
        else:
            sides[side][module] = tensor
    for module in sides["A"].keys() ^ sides["B"].keys():
        has, lacks = ("A", "B") if module in sides["A"] else ("B", "A")
        raise damaged(file, f"it has {has} of {module!r} but not {lacks}")
    pairs = {module: (lora_a, sides["B"][module]) for module, lora_a in sides["A"].items()}
    for module, (lora_a, lora_b) in pairs.items():
        if lora_a.dim() != 2 or lora_b.dim() != 2 or len(lora_a) != lora_b.shape[1] or not len(lora_a):
            shapes = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            raise damaged(file, f"A and B of {module!r} are {shapes}, expected (r, inputs) and (outputs, r)")
    return AdapterTensors(pairs, others)


def check_numbers(file: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor of an expert or head that is cast only with a loss, or has numbers that no training gives.

    Raises:
        CheckpointError: If its data type is none of floating-point numbers, or a number lies beyond 1e6.
    """
    if tensor.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise damaged(file, f"{name!r} has the data type {str(tensor.dtype).removeprefix('torch.')}, expected {known}")
    largest = max(-tensor.min().item(), tensor.max().item()) if tensor.numel() else 0.0
    if largest > _LARGEST:
        raise damaged(file, f"{name!r} holds {largest:.3g}, expected numbers within {_LARGEST:g}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: If it is missing, damaged or holds numbers that are not finite.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # safetensors raises its own exception, and lets others through
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}. Copy the file again, or train again.") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or math.isfinite(tensor.sum()):  # a finite sum has finite terms
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{str(path)!r} holds NaN or infinite numbers in {name!r}. Train this expert again.")
    return tensors


def load_expert(path: Path, name: str, *, entry: ExpertEntry, as_name: str | None = None) -> Expert:
    """Read an expert of a checkpoint.

    Args:
        path: Folder of the checkpoint.
        name: The expert's name there.
        entry: The expert in the manifest.
        as_name: The expert's name in the model, if another.

    Raises:
        CheckpointError: If a file is missing or damaged, or not what the manifest says.
    """
    folder = path / "experts" / check_name(name)
    config, (deltas, others) = read_adapter_config(folder), read_adapter_tensors(folder)
    if others:
        raise damaged(folder / ADAPTER_WEIGHTS, f"{next(iter(others))!r} belongs to no layer")
    for module, (lora_a, _) in deltas.items():
        rank, alpha = config.rank_of(module), config.alpha_of(module)
        if rank != len(lora_a) or alpha != entry.alpha:
            problem = f"it says rank {rank} and alpha {alpha:g} for {module!r}, whose rank is {len(lora_a)}"
            raise damaged(folder / ADAPTER_CONFIG, f"{problem}, and whose alpha in the manifest is {entry.alpha:g}")
    expert = Expert(as_name or name, entry.alpha, deltas, *_read_word_shapes(folder / _WORD_SHAPES))
    shape = (max(expert.ranks.values(), default=0), len(expert.ranks))
    if shape != (entry.rank, entry.layers):
        problem = f"it has rank {shape[0]} on {shape[1]} layers"
        raise damaged(folder / ADAPTER_WEIGHTS, f"{problem}, the manifest says rank {entry.rank} on {entry.layers}")
    return expert


def _read_word_shapes(file: Path) -> tuple[Tensor | None, int | None]:
    """Return the vectors of word shapes and the block before which they are added; None without any."""
    if not file.exists():
        return None, None
    tensors = read_tensors(file)
    weight, block = tensors.get("weight"), tensors.get("block")  # the first checkpoints lack the block
    if weight is None or weight.dim() != 2:
        raise damaged(file, "it has no table `weight`")
    check_numbers(file, "weight", weight)
    if block is not None and (block.dtype != torch.long or block.dim() or block < 0):
        raise damaged(file, "`block` is no number of a block")
    return weight, None if block is None else int(block)


def save_expert(folder: Path, expert: Expert, *, backbone: Backbone) -> None:
    """Write an expert as a PEFT adapter, which ``PeftModel.from_pretrained`` reads."""
    write_adapter(folder, expert, backbone=backbone)
    if expert.word_shapes is not None:  # in a separate file, because PEFT's format has no place for them
        shapes = {"weight": expert.word_shapes, "block": torch.tensor(expert.shapes_block)}
        write_bytes(folder / _WORD_SHAPES, safetensors.torch.save(shapes))


def write_adapter(
    folder: Path, expert: Expert, *, backbone: Backbone, prefix: str = "", head: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder.

    Args:
        folder: Created here.
        expert: Its word shapes are left out.
        backbone: Backbone of the expert, which the adapter names.
        prefix: Name of the backbone in the model that PEFT will wrap, e.g. ``bert.``; empty for the backbone itself.
        head: Weights of a token classifier that stands beside the backbone there, e.g. ``classifier.weight``.
    """
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    for module, (lora_a, lora_b) in expert.deltas.items():
        tensors[f"{_WRAPPER}{prefix}{module}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{_WRAPPER}{prefix}{module}.lora_B.weight"] = lora_b.contiguous()
    tensors |= {f"{_WRAPPER}{name}": tensor.contiguous() for name, tensor in (head or {}).items()}
    rank = max(expert.ranks.values(), default=1)
    smaller = {f"{prefix}{module}": size for module, size in expert.ranks.items() if size != rank}
    changed = [backbone.linears[module] for module in expert.deltas]
    config = LoraConfig(
        task_type="TOKEN_CLS" if head else None,
        r=rank,
        lora_alpha=expert.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r, also of a float
        target_modules=sorted(f"{prefix}{module}" for module in expert.deltas),
        modules_to_save=sorted({name.rpartition(".")[0] for name in head}) if head else None,
        rank_pattern=smaller,
        alpha_pattern=dict.fromkeys(smaller, expert.alpha),
        fan_in_fan_out=any(type(linear).__name__ == "Conv1D" for linear in changed),
        base_model_name_or_path=MINILM_ID if backbone.name == "minilm" else backbone.name,
        revision=backbone.revision,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # PEFT itself writes its sets in an order that differs from process to process.
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json(folder / ADAPTER_CONFIG, dict(sorted(values.items())))
    write_bytes(folder / ADAPTER_WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
