"""The adapter_config.json of a LoRA that PEFT 0.4 to 0.21 wrote: all settings that a plain LoRA may have."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparse_ft.checkpoint.folders import damaged
from sparse_ft.config import LARGEST_ALPHA
from sparse_ft.documents import read_json_object
from sparse_ft.errors import CheckpointError, explain

ADAPTER_CONFIG = "adapter_config.json"

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
# Settings of how an adapter was trained, or of where its layers are, which its tensors name one by one.
_HARMLESS = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "runtime_config",
    "target_modules", "velora_config",
}  # fmt: skip
# Initialisations that leave the frozen weight as it is; PiSSA, OLoRA, CorDA, LoftQ and the like change it.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_ADVICE = "Only plain LoRA becomes an expert; train it as that."


def _check_pattern(pattern: str) -> str:
    """Return a regular expression that names layers, if matching it takes little time."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    # A repeated group, or many repetitions in a row, can take years for one name of a layer.
    if len(pattern) > 256 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise ValueError("expected a short pattern, without repeated groups, that names layers")
    return pattern


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


Alpha = Annotated[float, Field(gt=0, le=LARGEST_ALPHA)]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class AdapterConfig(BaseModel):
    """The settings of a plain LoRA that decide what its layers compute, and the backbone that it belongs to."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: Alpha
    rank_pattern: Annotated[dict[Pattern, Rank], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    """Ranks of the layers whose name ends with the pattern."""
    alpha_pattern: Annotated[dict[Pattern, Alpha], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    """Alphas of the layers whose name ends with the pattern."""
    use_rslora: bool | None = None
    """Whether deltas are scaled by alpha / sqrt(r) in place of alpha / r."""
    base_model_name_or_path: str | None = Field(default=None, max_length=4096)
    revision: str | None = None
    task_type: str | None = None
    bias: Literal["none"] | None = None
    peft_type: Literal["LORA"]

    def rank_of(self, module: str) -> int:
        """Return the rank of a layer."""
        return _by_pattern(self.rank_pattern, module, default=self.r)

    def alpha_of(self, module: str) -> float:
        """Return the alpha by which PEFT scales a layer: alpha / rank."""
        alpha = _by_pattern(self.alpha_pattern, module, default=self.lora_alpha)
        # Rank-stabilised LoRA divides by the root of the rank: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
        return alpha * math.sqrt(self.rank_of(module)) if self.use_rslora else alpha


def _by_pattern(patterns: dict[str, Any], module: str, *, default: Any) -> Any:
    """Return the value for a layer as PEFT does: of the first pattern that matches the end of its name.

    https://github.com/huggingface/peft/blob/v0.17.0/src/peft/utils/other.py, ``get_pattern_key``.
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json, and refuse an adapter that is more than a plain LoRA.

    Raises:
        CheckpointError: If it changes more than a product of two small matrices would, or its config is damaged.
    """
    file = folder / ADAPTER_CONFIG
    values = read_json_object(file, "it", error=partial(damaged, file))
    _check_plain(values, folder)
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise damaged(file, explain(error, AdapterConfig).removesuffix(".")) from error


def _check_plain(values: dict[str, Any], folder: Path) -> None:
    """Refuse the settings by which an adapter changes more than a plain LoRA does."""
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"Adapter {str(folder)!r} is of type {values.get('peft_type')!r}. Expected 'LORA'; train it as one."
        )
    if values.get("bias") not in ("none", None):
        raise CheckpointError(
            f"Adapter {str(folder)!r} has bias={values['bias']!r}: it changes biases of the backbone, which all "
            f"experts share. Expected 'none'. {_ADVICE}"
        )
    for setting, reason in _REFUSED.items():
        if values.get(setting):
            raise CheckpointError(f"Adapter {str(folder)!r} has {setting}={values[setting]!r}: {reason}. {_ADVICE}")
    start = values.get("init_lora_weights", True)
    if not any(start is known or start == known for known in _INITIALISATIONS):
        raise CheckpointError(
            f"Adapter {str(folder)!r} has init_lora_weights={start!r}, which changed the weights of its backbone. Save "
            "it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    known = {*AdapterConfig.model_fields, *_REFUSED, *_HARMLESS, "init_lora_weights"}
    for setting, value in values.items():
        if setting not in known and value:
            raise CheckpointError(
                f"Adapter {str(folder)!r} has {setting}={value!r}, which this version does not know and which may "
                f"change what its layers compute. Update sparse-ft. {_ADVICE}"
            )
