"""LoRA adapters of other programs, read as experts.

Files of PEFT 0.4 to 0.21 are read without PEFT, which would need the model that the adapter was trained in, with its
head.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.model_folder import MINILM_ID
from sparse_ft.checkpoint.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from sparse_ft.checkpoint.expert_files import ADAPTER_WEIGHTS, read_adapter_tensors
from sparse_ft.checkpoint.folders import damaged
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.named_experts import Expert

LINEAR_HEADS = ("classifier", "score")
"""Names of the linear heads of transformers' classifiers."""


@dataclass(frozen=True)
class ForeignExpert:
    """An expert read from an adapter of another program."""

    expert: Expert
    head: dict[str, Tensor]
    """``weight`` and perhaps ``bias`` of the adapter's head, if a linear head is all that stands behind the blocks."""
    above: list[str]
    """Modules of the adapter behind the blocks (head, pooler), which are no part of the expert."""
    remarks: list[str]
    """Sentences about facts that could not be checked."""

    @property
    def notes(self) -> list[str]:
        """Sentences about modules that were left out and facts that could not be checked."""
        if not self.above:
            return self.remarks
        left_out = f"Not imported, because it stands behind the blocks (a head or pooler): {', '.join(self.above)}."
        return [left_out, *self.remarks]


def read_adapter(folder: Path, *, name: str, backbone: Backbone) -> ForeignExpert:
    """Read a LoRA that PEFT saved, whatever model class it was trained in.

    A factor by which a layer's scale differs from ``alpha / r`` (``alpha_pattern``, ``use_rslora``) goes into alpha if
    all layers share it, else into that layer's B.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        name: The expert's name in this project.
        backbone: The adapter must change linears of its blocks.

    Raises:
        CheckpointError: If it is no plain LoRA, changes more than linears in the blocks, or is damaged.
    """
    config = read_adapter_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"Adapter {str(folder)!r} has no {ADAPTER_WEIGHTS}. Pickled weights (.bin) are not read; load it once with "
            "PEFT and save it with safe_serialization=True."
        )
    pairs, others = read_adapter_tensors(folder)
    deltas: dict[str, tuple[Tensor, Tensor]] = {}
    alphas: dict[str, float] = {}
    outside = list(others)
    for module, (lora_a, lora_b) in pairs.items():
        linear = next((suffix for suffix in _suffixes(module) if suffix in backbone.linears), None)
        if linear is None:
            outside.append(module)
            continue
        if linear in deltas:
            raise CheckpointError(
                f"Adapter {str(folder)!r} changes the layer {linear!r} twice, the second time as {module!r}. It was "
                "trained on another architecture."
            )
        deltas[linear] = (lora_a.float(), lora_b.float())
        alphas[linear] = _alpha(config, module, rank=lora_a.shape[0], folder=folder)
    above = _above_the_blocks(outside, backbone=backbone, folder=folder)
    if not deltas:
        raise CheckpointError(
            f"Adapter {str(folder)!r} changes no linear in the blocks of this backbone, e.g. "
            f"{next(iter(backbone.linears))!r}. It was trained on another architecture."
        )
    head = _linear_head(others, folder, width=backbone.hidden_size) if len(above) == 1 else {}
    return ForeignExpert(_with_one_alpha(name, deltas, alphas), head, above, _remarks(config, backbone=backbone))


def _linear_head(tensors: Mapping[str, Tensor], folder: Path, *, width: int) -> dict[str, Tensor]:
    """Return ``weight`` [O, H] and perhaps ``bias`` [O] of a linear head; empty without one."""
    for name in LINEAR_HEADS:
        weights = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        head = {key.removeprefix(f"{name}."): value.float() for key, value in weights.items()}
        if head.keys() not in ({"weight"}, {"weight", "bias"}):
            continue
        shape = head["weight"].shape
        if len(shape) != 2 or shape[1] != width or ("bias" in head and head["bias"].shape != shape[:1]):
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in head.items())
            raise damaged(
                folder / ADAPTER_WEIGHTS, f"its head has {shapes}, expected (outputs, {width}) and (outputs,)"
            )
        return head
    return {}


def _suffixes(name: str) -> list[str]:
    """Return a dotted name without its first 0, 1, 2 … parts."""
    return [name.split(".", start)[-1] for start in range(name.count(".") + 1)]


def _above_the_blocks(names: Iterable[str], *, backbone: Backbone, folder: Path) -> list[str]:
    """Return the modules that stand behind the backbone (head, pooler), and refuse modules of the backbone itself."""
    known = {name for name, _ in backbone.model.named_modules() if name}
    for name in names:
        if any(f"{suffix}.".startswith(f"{part}.") for suffix in _suffixes(name) for part in known):
            raise CheckpointError(
                f"Adapter {str(folder)!r} changes {name!r}, which is no linear in the "
                f"{backbone.num_blocks} blocks of this backbone (such as {next(iter(backbone.linears))!r}). It belongs "
                "to another backbone, or changes what all experts share."
            )
    return list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in names))


def _alpha(config: AdapterConfig, module: str, *, rank: int, folder: Path) -> float:
    """Return the alpha by which PEFT scales a layer (alpha / rank); the rank must agree with the config."""
    expected = config.rank_of(module)
    if expected != rank:
        raise CheckpointError(
            f"Adapter {str(folder)!r} has rank {rank} in {module!r}, but its {ADAPTER_CONFIG} says {expected}. One of "
            "the two files belongs to another adapter."
        )
    return config.alpha_of(module)


def _with_one_alpha(name: str, deltas: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float]) -> Expert:
    """Make an expert with the alpha of most layers; the B of each other layer is multiplied to compensate."""
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    scaled = {}
    for module, (lora_a, lora_b) in deltas.items():
        factor = alphas[module] / alpha
        scaled[module] = (lora_a, lora_b if factor == 1 else (lora_b.double() * factor).float())
    return Expert(name, alpha, scaled)


def _remarks(config: AdapterConfig, *, backbone: Backbone) -> list[str]:
    """Say that the adapter names another backbone than the one it is read for, if it does."""
    base = config.base_model_name_or_path
    here = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    if not base or here in (backbone.name, MINILM_ID if backbone.name == "minilm" else backbone.name):
        return []
    return [f"It names the backbone {base!r}, this one is {backbone.name!r}; only the shapes could be compared."]
