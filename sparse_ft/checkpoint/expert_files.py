"""The files of an expert: a PEFT adapter, and word shapes beside it."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.model_folder import MINILM_ID
from sparse_ft.checkpoint.folders import damaged, write_bytes, write_json
from sparse_ft.documents import read_json_object
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.named_experts import Expert

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WORD_SHAPES = "word_shapes.safetensors"
_WRAPPER = "base_model.model."
"""Prefix of every tensor in PEFT's files."""


class AdapterTensors(NamedTuple):
    """The tensors of a PEFT adapter; names are without PEFT's prefix."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    """Module name to (A [r, I], B [O, r])."""
    others: dict[str, Tensor]
    """All other tensors, e.g. of a head."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    file = folder / ADAPTER_CONFIG
    return read_json_object(file, "it", error=partial(damaged, file))


def read_adapter_tensors(folder: Path) -> AdapterTensors:
    """Read adapter_model.safetensors.

    Raises:
        CheckpointError: If the file is missing or damaged, or a matrix lacks its counterpart.
    """
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    pairs, others = {}, {}
    for key, tensor in tensors.items():
        module, separator, side = key.removeprefix(_WRAPPER).removesuffix(".weight").rpartition(".lora_")
        if not separator or side not in ("A", "B"):
            others[key.removeprefix(_WRAPPER)] = tensor
            continue
        twin = key.replace(f".lora_{side}.", f".lora_{'B' if side == 'A' else 'A'}.")
        if twin not in tensors:
            raise damaged(folder / ADAPTER_WEIGHTS, f"it has {key!r} but not {twin!r}")
        if side == "A":
            pairs[module] = (tensor, tensors[twin])
    return AdapterTensors(pairs, others)


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
        if not tensor.is_floating_point() or math.isfinite(tensor.sum()):  # a finite sum has finite terms
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{str(path)!r} holds NaN or infinite numbers in {name!r}. Train this expert again.")
    return tensors


def load_expert(folder: Path, *, name: str) -> Expert:
    """Read an expert of a checkpoint.

    Args:
        folder: Holds the expert's files.
        name: The expert's name in this model.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    config, deltas = read_adapter_config(folder), read_adapter_tensors(folder).pairs
    try:
        alpha = float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / ADAPTER_CONFIG, repr(error)) from error
    shapes = read_tensors(folder / _WORD_SHAPES) if (folder / _WORD_SHAPES).exists() else {}
    block = int(shapes["block"]) if "block" in shapes else None  # the first checkpoints lack it
    return Expert(name, alpha, deltas, shapes.get("weight"), block)


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
