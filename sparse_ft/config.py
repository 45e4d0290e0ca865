"""Run configs: frozen sections, whose defaults are defined only here; YAML files list differences from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from sparse_ft.documents import parse_yaml, read_yaml
from sparse_ft.errors import ConfigError, explain, unknown_name
from sparse_ft.resources import bundled_dir, bundled_names
from sparse_ft.sections import MAX_SEED, Flag, Section, Texts

LARGEST_ALPHA = 1e6
"""Largest alpha of an expert; with larger ones the deltas overflow."""
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
"""Divisor of logits; beyond these bounds the probabilities are 0 and 1, or all equal."""


class ExpertConfig(Section):
    """The trained experts."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Rank of the experts' deltas."""
    alpha: float = Field(default=16.0, gt=0, le=LARGEST_ALPHA)
    """Scale of the deltas, which are multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the deltas."""
    first_block: int = Field(default=0, ge=0)
    """0-based index of the lowest block with expert layers; the blocks below are computed once for all tasks."""
    targets: Texts | None = None
    """Linears that get experts, by the last part of their name, e.g. [query, value]; null is all linears of a block."""
    word_shapes: Flag | None = None
    """Whether experts of tagging tasks see the capitals and digits of a word; null: if the backbone drops case."""
    pooling: Literal["auto", "unit", "mean", "first", "last"] = "auto"
    """The vector that represents a text: that of its first or last token, the mean over its tokens, or that mean scaled
    to a fixed length (unit); auto is last for causal backbones, else unit."""
    pool: int = Field(default=0, ge=0, le=1024)
    """Number of experts that belong to no task and are trained jointly with the gate; 1 is one expert for all tasks,
    without a gate; 0 is one expert per task."""
    shared: Flag = False
    """In a joint run, whether every row also uses one additional expert, whatever the gate selects."""
    shared_a: Flag = False
    """Whether the experts of a pool have one A in common and differ only in B (HydraLoRA)."""
    frozen: Texts = Field(default_factory=list)
    """Experts of the checkpoint in ``start`` that do not change; the heads of their tasks, and the gate of a joint run,
    are trained."""


class TrainConfig(Section):
    """The training loop."""

    epochs: int = Field(default=5, ge=1)
    """Number of passes over the rows of a task, or over the rows of all tasks that share experts. Setting it sets
    min_steps to 0, unless that is set, too."""
    min_steps: int = Field(default=240, ge=0)
    """Fewest optimizer steps: small data is repeated until they are reached, with an evaluation at most every tenth,
    so the number of passes is a multiple of those between two evaluations; 0 where only epochs is set."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per optimizer step."""
    accumulation: int = Field(default=1, ge=1)
    """Number of parts in which a batch is computed; more parts need less memory and give the same result."""
    workers: int = Field(default=0, ge=0, le=1024)
    """On a CPU, number of threads that compute parts of a batch in parallel; 0 is the number that torch would use."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Highest learning rate of the experts."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate of the heads; null is learning_rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly from 0; afterwards it falls linearly to 0."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm of the parameters that are trained together; 0 does not clip."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread evenly over all labels."""
    backbone_dropout: Flag = False
    """Whether the dropout of the frozen backbone is active in training; it makes a step a quarter slower, or more."""
    head_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the input of the heads."""
    patience: int = Field(default=3, ge=0)
    """Evaluations without a better score after which a task, or all tasks that share experts, stop training; 0 never
    stops early."""
    mixture: Literal["proportional", "smoothed", "uniform"] = "proportional"
    """How often rows of each task are drawn where tasks share experts: in proportion to its rows, to their square root,
    or equally often."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the frozen weights in training; auto is bf16 if the hardware computes in it, else fp32."""
    trunk_memory: int = Field(default=1024, ge=0)
    """MiB for cached hidden states that enter experts.first_block; if they do not fit, every epoch recomputes them."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between two saves of the state that ``--resume`` continues from."""


class SharedConfig(Section):
    """One expert that all tasks share in the lower blocks, below a small one for each task (stage shared)."""

    passes: float = Field(default=1.5, ge=1)
    """Most passes through the backbone that the answers of all tasks to one text may cost together; 1 leaves each task
    a head of its own and no more."""
    own_blocks: dict[str, int] = Field(default_factory=dict)
    """Task to the number of highest blocks that its own expert changes, from 0 to all. Tasks that are not named get as
    many as passes allows; a task that is added to a checkpoint with a shared expert gets 1."""
    rank: int = Field(default=64, ge=1, le=1024)
    """Rank of the shared expert's deltas."""
    teachers: Texts = Field(default_factory=list)
    """Checkpoints whose experts teach the tasks of the same names (``distill``)."""
    temperature: Temperature = 2.0
    """Divides the logits of teacher and student; their divergence is multiplied by its square."""
    transfer: Literal["none", "words", "all"] = "words"
    """Teachers that also answer the training texts of the other tasks, which have no labels for them: none, those of
    tasks on words, or all; single texts only."""
    teacher_weight: float = Field(default=0.9, ge=0, le=1)
    """Weight of the teachers' answers in the loss at the first step, the labels having the rest; it falls linearly
    towards 0."""


class GateConfig(Section):
    """The gate, which selects the experts of a text or of each of its tokens."""

    type: Literal["sequence", "prototype", "token"] = "sequence"
    """sequence is a small perceptron over texts; prototype selects the expert whose training texts have the nearest
    mean; token decides for every token in every block and is trained jointly with the experts."""
    block: int | None = Field(default=None, ge=0)
    """0-based index of the highest block whose input the gate reads; null is the middle block, or experts.first_block
    if that is higher. Blocks from experts.first_block up to this one are computed a second time for every text. With a
    shared expert, null is the lowest block of a task's own, and none is computed twice."""
    top_k: int | None = Field(default=None, ge=1)
    """Most experts of a text or token, whose deltas are weighted by the gate; null is 2 in a joint run, else 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Probability that the selected experts must reach together; further experts, up to top_k, are left out. Null
    always selects top_k."""
    temperature: Temperature = 1.0
    """Divisor of the gate's logits: a value above 1 makes the weights of several experts more equal."""
    min_confidence: float | None = Field(default=None, ge=0, le=1)
    """Familiarity below which a text is answered with unknown, where the user gives no --min-familiarity: the share of
    its own texts that the gate turns away. 0 answers every text; null is 0.005."""
    rows: int = Field(default=10000, ge=2)
    """Most training rows of each expert that the gate is fitted on."""
    shortlist: int | None = Field(default=None, ge=1)
    """Number of experts that the tokens of one text select from; null is all, or 4 if there are more than 16."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In a joint run, the input of the gate is multiplied by random numbers from 1 - jitter to 1 + jitter."""
    capacity: float | None = Field(default=None, gt=0)
    """In a joint run, most rows or tokens of an expert, as a multiple of an even share; null is no limit."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the gate in a joint run."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss in a joint run."""
    z_loss: float = Field(default=0.001, ge=0)
    """Weight of the z-loss, which keeps the gate's logits small, in a joint run."""
    routing_loss: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy between the gate and the expert of each row's task, in a joint run of one expert per
    task."""


class DataConfig(Section):
    """Reading and encoding of rows."""

    max_length: int = Field(default=256, ge=8)
    """Most tokens of a row; longer texts are cut, or read in overlapping windows if their words are classified."""
    train_limit: int | None = Field(default=None, ge=1)
    """Most training rows of each task, drawn at random by ``seed``; null is all."""
    division: Literal["stratified", "random", "all"] = "stratified"
    """How rows without splits are divided: stratified holds out a tenth of each class for validation and a tenth for
    test; random, the rule before version 0.2, a tenth of all rows; all trains on every row, so that none is left to
    score."""


class RunConfig(Section):
    """All settings of a training run."""

    stage: Literal["experts", "gate", "joint", "shared"] = "experts"
    """experts trains experts and then fits the gate; gate fits only the gate; joint trains experts and gate together,
    with several experts per text or token; shared trains one expert for all tasks in the lower blocks, with experts of
    their own above it."""
    tasks: Texts = Field(default_factory=list)
    """Bundled names or paths of task files."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Task name to the folder or file of its data."""
    backbone: str = "minilm"
    """minilm, the path of a folder, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a backbone on the hub; null is its main branch."""
    output: str | None = None
    """Folder of the checkpoint; null is the next free runs/<tasks>."""
    start: str | None = None
    """Checkpoint to start from (``--from``): its experts are kept, and those of ``tasks`` are trained further; null
    starts with none."""
    seed: int = Field(default=13, ge=0, le=MAX_SEED)
    """Seed of all random numbers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto is a CUDA device if there is one, else the CPU."""
    experts: ExpertConfig = ExpertConfig()
    train: TrainConfig = TrainConfig()
    shared: SharedConfig = SharedConfig()
    gate: GateConfig = GateConfig()
    data: DataConfig = DataConfig()


def load_config(
    base: str | Path | RunConfig | None = None,
    *,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Assemble a run config from the defaults, the file, the overrides and the values; later ones win.

    Args:
        base: Bundled name, path of a YAML file with differences from the defaults, or a config.
        overrides: ``section.key=value`` strings; values are read as YAML.
        values: Top-level values, e.g. from command-line options.

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
        path = key.strip().split(".")
        _put(merged, path, _parse_value(path, text, override), override)
    merged.update(values or {})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"Config: {explain(error, RunConfig)}") from error


def changed_config(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a config with some top-level values replaced; they count as set."""
    return RunConfig.model_validate({**run.model_dump(exclude_unset=True), **values})


def _read(name_or_path: str | Path) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        known = bundled_names("configs")
        if str(name_or_path) not in known:
            raise ConfigError(unknown_name("config", str(name_or_path), known) + " Or give the path of a YAML file.")
        path = bundled_dir("configs") / f"{name_or_path}.yaml"
    values = read_yaml(path, f"Config file {str(path)!r}")
    if not isinstance(values, dict):
        raise ConfigError(f"Config file {str(path)!r} must hold a mapping of keys, not {type(values).__name__}.")
    return values


def _parse_value(path: Sequence[str], text: str, override: str) -> Any:
    """Read a value as YAML; a text setting is taken unchanged, so that a revision may consist of digits."""
    value = parse_yaml(text, f"--set {override!r}: the value")
    verbatim = _is_text(path) and value is not None and not isinstance(value, str | list | dict)
    return text.strip() if verbatim else value


def _is_text(path: Sequence[str]) -> bool:
    """Tell whether the setting at a path is text and nothing else."""
    section: Any = RunConfig
    for part in path[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = None if field is None else field.annotation
    field = getattr(section, "model_fields", {}).get(path[-1])
    return field is not None and {*(get_args(field.annotation) or [field.annotation])} <= {str, type(None)}


def _put(target: dict[str, Any], path: Sequence[str], value: Any, override: str) -> None:
    for part in path[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a section.")
        target = inner
    target[path[-1]] = value
