"""The peers that the benchmarks compare with: PEFT's ways to hold several LoRAs, on the packaged MiniLM.

All adapters have rank 8 on all linears of the blocks, with random weights.
"""

import copy
import tempfile
from pathlib import Path

from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from transformers import PreTrainedModel

from sparse_ft.backbone.backbone import load_backbone

RANK = 8
_TARGETS = r".*encoder\.layer\..*\.(query|key|value|dense)"
"""The linears of the blocks; the pooler's is not used."""


def mixed(adapters: int, *, model: PreTrainedModel | None = None) -> PeftModel:
    """Give the backbone, or one that was loaded, LoRAs named e0, e1 and so on."""
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=_TARGETS, init_lora_weights=False)
    wrapped = get_peft_model(model or load_backbone("minilm").model, config, adapter_name="e0")
    for index in range(1, adapters):
        wrapped.add_adapter(f"e{index}", copy.deepcopy(config))
    return wrapped.eval()


def saved(folder: Path, number: int) -> list[Path]:
    """Write so many adapter folders, each with the same numbers, and return them."""
    paths = [folder / f"e{index}" / "e0" for index in range(number)]
    model = mixed(1)
    for path in paths:
        model.save_pretrained(str(path.parent))
    return paths


def arrow(adapters: int, *, model: PreTrainedModel) -> PeftModel:
    """Build PEFT's Arrow, which routes each token to two adapters without training."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for path in saved(Path(folder), adapters)]
        wrapped = create_arrow_model(model, paths, ArrowConfig(top_k=2)).eval()
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return wrapped


def xlora(adapters: int, *, model: PreTrainedModel) -> PeftModel:
    """Build PEFT's X-LoRA, which runs the model twice and weighs all adapters for each token."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {str(index): str(path) for index, path in enumerate(saved(Path(folder), adapters))}
        model.config.use_cache = False
        config = XLoraConfig(task_type="FEATURE_EXTRACTION", hidden_size=model.config.hidden_size, adapters=paths)
        return get_peft_model(model, config).eval()
