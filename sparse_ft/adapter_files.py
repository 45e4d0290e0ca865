"""Write an expert as an adapter of PEFT, which ``PeftModel.from_pretrained`` reads; foreign.py reads such folders."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from sparse_ft.backbone.backbone import MINILM_ID, Backbone
from sparse_ft.experts.named_experts import Expert
from sparse_ft.folders import write_bytes

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
