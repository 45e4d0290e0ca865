"""Experts from elsewhere: LoRA adapters that PEFT wrote, read into this project's form.

What is read: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT 0.4 to 0.21 write them. PEFT itself is
not asked, because it would need the model that the adapter was trained in, head included.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.model_folder import MINILM_ID
from sparse_ft.checkpoint.folders import write_bytes
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
LINEAR_HEADS = ("classifier", "score")
"""How transformers' classifiers name a head that is a linear."""

# Settings that change what a layer computes, with the reason why it is no expert then. All are off by default.
_REFUSED = {
    "use_dora": "DoRA also rescales the frozen weight",
    "lora_bias": "it adds a bias to B",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "KaSA changes the frozen weight",
    "monteclora_config": "it draws its weights at random",
    "arrow_config": "it is a router over other adapters",
    "alora_invocation_tokens": "it works only behind certain tokens",
    "layer_replication": "it repeats blocks of the backbone",
    "target_parameters": "it changes parameters that are no linear",
    "trainable_token_indices": "it changes embeddings",
}
# Starts that leave the frozen weight as it is; PiSSA, OLoRA, CorDA, LoftQ and the like change it.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class ForeignExpert:
    """An expert that was read from elsewhere."""

    expert: Expert
    above: list[str]
    """Modules of the adapter that stand behind the blocks (head, pooler), which are no part of the expert."""
    remarks: list[str]
    """Sentences about what could not be checked."""

    @property
    def notes(self) -> list[str]:
        """Sentences about what was left out or could not be checked."""
        if not self.above:
            return self.remarks
        left_out = f"Not imported, because it stands behind the blocks (a head or pooler): {', '.join(self.above)}."
        return [left_out, *self.remarks]


def read_adapter(folder: Path, *, name: str, backbone: Backbone) -> ForeignExpert:
    """Read a LoRA that PEFT saved, whatever model class it was trained in.

    A factor by which a layer's scale differs from ``alpha / r`` (``alpha_pattern``, ``use_rslora``) goes into alpha if
    all layers share it, else into that layer's B.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
        name: The expert's name here.
        backbone: Whose linears it must change.

    Raises:
        CheckpointError: If it is no plain LoRA, changes more than linears in the blocks, or is damaged.
    """
    config = read_adapter_config(folder)
    if not (folder / _WEIGHTS).is_file():
        raise CheckpointError(
            f"Adapter {str(folder)!r} has no {_WEIGHTS}. Pickled weights (.bin) are not read; load it once with PEFT "
            "and save it with safe_serialization=True."
        )
    tensors = read_tensors(folder / _WEIGHTS)
    pairs, others = _sort(tensors, folder)
    deltas: dict[str, tuple[Tensor, Tensor]] = {}
    alphas: dict[str, float] = {}
    for module, (lora_a, lora_b) in pairs.items():
        linear = _find(module, backbone.linears)
        if linear is None:
            others.append(module)
            continue
        if linear in deltas:
            raise CheckpointError(
                f"Adapter {str(folder)!r} changes the layer {linear!r} twice, the second time as {module!r}. It was "
                "trained on another architecture."
            )
        deltas[linear] = (lora_a.float(), lora_b.float())
        alphas[linear] = _alpha(config, module.removeprefix(WRAPPER), rank=lora_a.shape[0], folder=folder)
    above = _above_the_blocks(others, backbone=backbone, folder=folder)
    if not deltas:
        raise CheckpointError(
            f"Adapter {str(folder)!r} changes no linear in the blocks of this backbone, e.g. "
            f"{next(iter(backbone.linears))!r}. It was trained on another architecture."
        )
    return ForeignExpert(_with_one_alpha(name, deltas, alphas), above, _remarks(config, backbone=backbone))


def read_head(folder: Path) -> dict[str, Tensor]:
    """Return ``weight`` and perhaps ``bias`` of the linear head of an adapter; empty if it has none, or another."""
    tensors = read_tensors(folder / _WEIGHTS)
    found = {key.removeprefix(WRAPPER): tensor for key, tensor in tensors.items() if ".lora_" not in key}
    for name in LINEAR_HEADS:
        own = {
            key.removeprefix(f"{name}."): tensor.float() for key, tensor in found.items() if key.startswith(f"{name}.")
        }
        if own.keys() in ({"weight"}, {"weight", "bias"}) and own["weight"].dim() == 2:
            return own
    return {}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, and refuse what is no plain LoRA.

    Raises:
        CheckpointError: If it is damaged, or changes more than a product of two small matrices would.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {error!r}. Copy the folder again.") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"Adapter {str(folder)!r} is of type {config.get('peft_type')!r}. Expected 'LORA'; train it as one."
        )
    advice = "Only plain LoRA becomes an expert; train it as that."
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"Adapter {str(folder)!r} has bias={config['bias']!r}: it changes biases of the backbone, which all "
            f"experts share. Expected 'none'. {advice}"
        )
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise CheckpointError(f"Adapter {str(folder)!r} has {setting}={config[setting]!r}: {reason}. {advice}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"Adapter {str(folder)!r} has init_lora_weights={start!r}, which changed the weights of its backbone. Save "
            "it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    return config


def _sort(tensors: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Part tensors into (A [r, I], B [O, r]) by module, and the names of all others."""
    pairs, others = {}, []
    for key, tensor in tensors.items():
        module, found, side = key.removesuffix(".weight").rpartition(".lora_")
        if not found or side not in ("A", "B"):
            others.append(key)
            continue
        twin = key.replace(f".lora_{side}.", f".lora_{'B' if side == 'A' else 'A'}.")
        if twin not in tensors:
            raise CheckpointError(f"Adapter {str(folder)!r} is damaged: it has {key!r} but not {twin!r}.")
        if side == "A":
            pairs[module] = (tensor, tensors[twin])
    return pairs, others


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _find(module: str, linears: Mapping[str, Any]) -> str | None:
    """Find a linear by a name that may have more in front, e.g. ``base_model.model.bert.``."""
    return next((suffix for suffix in _suffixes(module) if suffix in linears), None)


def _above_the_blocks(names: list[str], *, backbone: Backbone, folder: Path) -> list[str]:
    """Return the modules that stand behind the backbone (head, pooler), and refuse what is in it or replaces it."""
    known = {name for name, _ in backbone.model.named_modules() if name}
    for name in names:
        inside = [part for suffix in _suffixes(name) for part in _prefixes(suffix) if part in known]
        if inside:
            raise CheckpointError(
                f"Adapter {str(folder)!r} changes {name.removeprefix(WRAPPER)!r}, which is no linear in the "
                f"{backbone.num_blocks} blocks of this backbone (such as {next(iter(backbone.linears))!r}). It belongs "
                "to another backbone, or changes what all experts share."
            )
    return list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name.removeprefix(WRAPPER)) for name in names))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]


def _alpha(config: Mapping[str, Any], module: str, *, rank: int, folder: Path) -> float:
    """Return the alpha of a layer, such that PEFT multiplies B A with alpha / rank.

    Args:
        config: Of the adapter.
        module: The layer's name in the model that PEFT wrapped.
        rank: Of its tensors, which must be what the config says.
        folder: For messages.
    """
    try:
        expected = int(_by_pattern(config.get("rank_pattern"), module, default=config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern"), module, default=config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{str(folder / ADAPTER_CONFIG)!r} is damaged: {error!r}. Expected numbers for r, lora_alpha and their "
            "patterns. Copy the folder again."
        ) from error
    if expected != rank:
        raise CheckpointError(
            f"Adapter {str(folder)!r} has rank {rank} in {module!r}, but its {ADAPTER_CONFIG} says {expected}. One of "
            "the two files belongs to another adapter."
        )
    if not math.isfinite(alpha) or alpha == 0:
        raise CheckpointError(f"Adapter {str(folder)!r} has alpha {alpha:g} for {module!r}. Expected one other than 0.")
    # Rank-stabilised LoRA divides by the root of the rank: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, *, default: Any) -> Any:
    """Look a layer up as PEFT does: the first key that matches the end of its name as a regular expression.

    https://github.com/huggingface/peft/blob/v0.17.0/src/peft/utils/other.py, ``get_pattern_key``.
    """
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _with_one_alpha(name: str, deltas: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float]) -> Expert:
    """Make an expert whose alpha is what most layers have; the B of the others makes up for the difference."""
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    scaled = {}
    for module, (lora_a, lora_b) in deltas.items():
        factor = alphas[module] / alpha
        scaled[module] = (lora_a, lora_b if factor == 1 else (lora_b.double() * factor).float())
    return Expert(name, alpha, scaled)


def _remarks(config: Mapping[str, Any], *, backbone: Backbone) -> list[str]:
    base = config.get("base_model_name_or_path")
    if base:
        here = str(Path(base).resolve()) if Path(base).is_dir() else base
        if here not in (backbone.name, MINILM_ID if backbone.name == "minilm" else backbone.name):
            return [
                f"It names the backbone {base!r}, this one is {backbone.name!r}; only the shapes could be compared."
            ]
    return []


_WORD_SHAPES = "word_shapes.safetensors"


def _save_expert(folder: Path, expert: Expert, *, model: SparseExpertModel) -> None:
    """Write an expert as a PEFT adapter, which ``PeftModel.from_pretrained`` reads."""
    write_adapter(folder, expert, backbone=model.backbone)
    if expert.word_shapes is not None:  # a file of its own: PEFT has no place for it
        shapes = {"weight": expert.word_shapes, "block": torch.tensor(expert.shapes_block)}
        write_bytes(folder / _WORD_SHAPES, safetensors.torch.save(shapes))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: If it is missing, damaged or holds numbers that are not finite.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # safetensors has one exception of its own and lets others through
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}. Copy the file again, or train again.") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or math.isfinite(tensor.sum()):  # what has a finite sum is finite itself
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{str(path)!r} holds NaN or infinite numbers in {name!r}. Train this expert again.")
    return tensors


def load_expert(folder: Path, *, name: str) -> Expert:
    """Read an expert from a PEFT adapter folder.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
        name: The expert's name in this model.
    """
    file = folder / "adapter_config.json"
    try:
        alpha = float(json.loads(file.read_text(encoding="utf-8"))["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {error!r}. Restore the folder from a copy or train again."
        ) from error
    tensors = read_tensors(folder / "adapter_model.safetensors")
    deltas = {}
    for key, lora_a in tensors.items():
        if key.endswith(".lora_A.weight"):
            other = key.replace(".lora_A.", ".lora_B.")
            if other not in tensors:
                raise CheckpointError(f"{str(folder)!r} is damaged: it lacks {other}. Restore the folder from a copy.")
            deltas[key.removeprefix(WRAPPER).removesuffix(".lora_A.weight")] = (lora_a, tensors[other])
    shapes = read_tensors(folder / _WORD_SHAPES) if (folder / _WORD_SHAPES).exists() else {}
    block = int(shapes["block"]) if "block" in shapes else None  # the first checkpoints do not say
    return Expert(name, alpha, deltas, shapes.get("weight"), block)


WRAPPER = "base_model.model."
"""What PEFT puts before the name of every tensor."""


def write_adapter(
    folder: Path, expert: Expert, *, backbone: Backbone, prefix: str = "", head: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder.

    Args:
        folder: To create.
        expert: What it says about word shapes is left out: PEFT has no place for it.
        backbone: That the adapter names and whose linears it changes.
        prefix: Of the backbone inside the model that PEFT will wrap, e.g. ``bert.``; empty for the backbone itself.
        head: Weights of a token classifier that stands beside the backbone there, e.g. ``classifier.weight``.
    """
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    for module, (lora_a, lora_b) in expert.deltas.items():
        tensors[f"{WRAPPER}{prefix}{module}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{WRAPPER}{prefix}{module}.lora_B.weight"] = lora_b.contiguous()
    tensors |= {f"{WRAPPER}{name}": tensor.contiguous() for name, tensor in (head or {}).items()}
    rank = max(expert.ranks.values(), default=1)
    smaller = {f"{prefix}{module}": size for module, size in expert.ranks.items() if size != rank}
    changed = [backbone.linears[module] for module in expert.deltas]
    config = LoraConfig(
        task_type="TOKEN_CLS" if head else None,
        r=rank,
        lora_alpha=expert.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r; a float is as good
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
    config.save_pretrained(str(folder))
    write_bytes(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
