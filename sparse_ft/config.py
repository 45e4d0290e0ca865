"""Run configs: frozen sections whose defaults stand here and nowhere else; YAML files list differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_ft.errors import ConfigError, explain, unknown_name
from sparse_ft.resources import bundled_dir, bundled_names


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExpertConfig(_Section):
    """The experts that are trained."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Rank of the deltas."""
    alpha: float = Field(default=16.0, gt=0)
    """Deltas are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the input of each delta."""
    first_block: int = Field(default=0, ge=0)
    """Lowest block with expert layers; what lies below is shared by all tasks."""
    targets: list[str] | None = None
    """Last parts of the names of the linears that get experts, e.g. [query, value]; null takes all of a block."""
    word_shapes: bool | None = None
    """Whether experts that tag words see how a word is written (capitals, digits); null: if the backbone drops case."""
    pooling: Literal["auto", "unit", "mean", "first", "last"] = "auto"
    """How a text becomes one vector: unit is the mean over its tokens scaled to one length; auto is last for causal
    backbones, else unit."""
    pool: int = Field(default=0, ge=0, le=1024)
    """Train so many experts that belong to no task, jointly with the gate that mixes them; 1 is an expert that all
    tasks share, without a gate; 0: one expert a task."""
    shared: bool = False
    """In a joint run: whether there is one expert more that every row uses, whatever the gate chooses."""
    shared_a: bool = False
    """Whether the experts of a pool have the same A and differ in B only (HydraLoRA)."""
    frozen: list[str] = Field(default_factory=list)
    """Experts of --from that stay as they are while their tasks are trained: heads learn, and a joint run's gate."""


class TrainConfig(_Section):
    """The training loop."""

    epochs: int = Field(default=5, ge=1)
    """Passes over the rows of a task, or of the tasks that share experts: one is as long as all of them together. Where
    rows are so few that several passes lie between two evaluations, they are made up to whole ones."""
    min_steps: int = Field(default=240, ge=0)
    """Small data is repeated until there are this many optimizer steps, a tenth or more between evaluations."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per optimizer step."""
    accumulation: int = Field(default=1, ge=1)
    """Parts that a batch is computed in, to save memory."""
    workers: int = Field(default=0, ge=0)
    """Threads that compute parts of a batch side by side, on a CPU; 0 takes one for each that torch would use."""
    learning_rate: float = Field(default=2e-3, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Of the heads; null takes learning_rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises; it falls linearly to 0 after that."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm of a task's parameters; 0 switches clipping off."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    backbone_dropout: bool = False
    """Whether the frozen backbone's own dropout is on in training; it slows a step by a quarter or more."""
    head_dropout: float = Field(default=0.1, ge=0, lt=1)
    patience: int = Field(default=3, ge=0)
    """Evaluations without a better score after which the training of a task stops, or of those that share experts; 0
    never stops early."""
    mixture: Literal["proportional", "smoothed", "uniform"] = "proportional"
    """How often each of the tasks that share experts is drawn: by its rows, by their square root, or equally."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen weights in training; auto is bf16 where the hardware computes in it."""
    trunk_memory: int = Field(default=1024, ge=0)
    """MiB that the hidden states entering experts.first_block may take; they are kept over the epochs if they fit."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between the saves that --resume continues from."""


class GateConfig(_Section):
    """The gate: which experts a text, or each of its tokens, goes through."""

    type: Literal["sequence", "prototype", "token"] = "sequence"
    """sequence learns a small perceptron over whole texts; prototype takes the nearest mean of each expert's texts;
    token lets every token choose in every block, and is trained jointly with the experts."""
    block: int | None = Field(default=None, ge=0)
    """Highest block whose input the gate reads; null is the middle one, or the lowest with experts if that is higher.
    Above the lowest with experts, a text costs the blocks up to here once more."""
    top_k: int | None = Field(default=None, ge=1)
    """Experts that a text or a token is sent through, their deltas weighted by the gate; null is 2 in a joint run, else
    1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Stop adding experts once their probabilities reach this sum; top_k stays the most."""
    temperature: float = Field(default=1.0, gt=0)
    """Above 1 the weights of several experts come closer to each other."""
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    """Texts that look less familiar than all but this share of the training texts are answered with unknown."""
    rows: int = Field(default=10000, ge=2)
    """Training rows of each expert that the gate is fitted on."""
    shortlist: int | None = Field(default=None, ge=1)
    """Experts that the tokens of one text choose among; null is all, or 4 where there are more than 16."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In a joint run, multiply what the gate reads by random numbers from 1 - jitter to 1 + jitter."""
    capacity: float | None = Field(default=None, gt=0)
    """In a joint run, most rows or tokens per expert, in multiples of an even share; null drops none."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of the gate in a joint run."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss in a joint run."""
    z_loss: float = Field(default=0.001, ge=0)
    """Weight of the z-loss, which keeps logits small, in a joint run."""
    routing_loss: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy between the gate and each row's own expert, in a joint run of one expert a task."""


class DataConfig(_Section):
    """How rows are read and encoded."""

    max_length: int = Field(default=256, ge=8)
    """Tokens per row; longer texts are cut, longer tagged texts are read in windows."""
    train_limit: int | None = Field(default=None, ge=1)
    """Use only so many training rows of each task, drawn by the seed."""


class RunConfig(_Section):
    """Everything a training run depends on."""

    stage: Literal["experts", "gate", "joint"] = "experts"
    """experts alone and then the gate among them; only the gate; or experts and gate jointly, mixing as it goes."""
    tasks: list[str] = Field(default_factory=list)
    """Bundled names or paths of task files."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Task name to folder or file of its data."""
    backbone: str = "minilm"
    revision: str | None = None
    """Of a backbone on the hub."""
    output: str | None = None
    """Folder of the checkpoint; null takes runs/<tasks>."""
    start: str | None = None
    """Checkpoint whose experts are kept or trained further (--from)."""
    seed: int = Field(default=13, ge=0)
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    experts: ExpertConfig = ExpertConfig()
    train: TrainConfig = TrainConfig()
    gate: GateConfig = GateConfig()
    data: DataConfig = DataConfig()


def load_config(
    base: str | Path | RunConfig | None = None,
    *,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Put a run config together: defaults, then the file, then the overrides, then the given values.

    Args:
        base: Bundled name, path of a YAML file with differences from the defaults, or a config.
        overrides: ``section.key=value`` strings; values are read as YAML.
        values: Top-level values that win over everything, e.g. from command-line options.

    Raises:
        ConfigError: With every problem in one paragraph.
    """
    merged: dict[str, Any] = {}
    if isinstance(base, RunConfig):
        merged = base.model_dump(exclude_unset=True)
    elif base is not None:
        merged = _read(base)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r} is not of the form section.key=value, e.g. train.epochs=3.")
        _put(merged, key.strip().split("."), _parse_value(text, override), override)
    merged.update(values or {})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"Config: {explain(error, RunConfig)}") from error


def changed_config(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a config with other top-level values; they count as set."""
    return RunConfig.model_validate({**run.model_dump(exclude_unset=True), **values})


def _read(name_or_path: str | Path) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        known = bundled_names("configs")
        if str(name_or_path) not in known:
            raise ConfigError(unknown_name("config", str(name_or_path), known) + " Or give the path of a YAML file.")
        path = bundled_dir("configs") / f"{name_or_path}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Config file {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"Config file {str(path)!r} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Config file {str(path)!r} must hold a mapping of keys, not {type(values).__name__}.")
    return values


def _parse_value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override!r}: the value is not readable YAML.") from error
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as text, for want of a dot
            return float(value)
        except ValueError:
            return value
    return value


def _put(target: dict[str, Any], path: Sequence[str], value: Any, override: str) -> None:
    for part in path[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a section.")
        target = inner
    target[path[-1]] = value
