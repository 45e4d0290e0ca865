"""The manifest of a checkpoint, which describes the content of the folder. Needs no torch, so `inspect` is fast."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_ft.checkpoint.folders import damaged, old_path
from sparse_ft.checkpoint.inventory import FilePath, Sha256, check_files
from sparse_ft.config import LARGEST_ALPHA, RunConfig, Temperature
from sparse_ft.documents import read_json_object, read_yaml
from sparse_ft.errors import CheckpointError, explain
from sparse_ft.paths import similar_path
from sparse_ft.tasks.spec import UNRECORDED, TaskSpec, parse_task
from sparse_ft.version import __version__

FORMAT = 1
"""Format number of the folder; higher numbers are refused."""
MANIFEST = "manifest.json"
GATE = "gate.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return a name if it is a safe file name.

    Raises:
        CheckpointError: If it is not.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"The name {name!r} is not allowed: use letters, digits, - and _, at most 64, a letter or digit first."
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]
"""Name of an expert or task, which is also that of a file."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BackboneEntry(_Entry):
    """The backbone that the checkpoint was trained on."""

    name: str = Field(min_length=1, max_length=4096)
    """``minilm``, a hub id or the absolute path of a folder."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    weights_sha256: Sha256
    num_blocks: int | None = Field(default=None, ge=1)
    """Null in checkpoints before 0.3."""


class ExpertEntry(_Entry):
    """The shape and scale of an expert."""

    rank: int = Field(ge=0)
    """Highest rank of its deltas."""
    alpha: float = Field(gt=0, le=LARGEST_ALPHA)
    layers: int = Field(ge=0)
    """Number of linears that it changes."""


class TaskEntry(_Entry):
    """The kind of a task, and the experts that serve it."""

    kind: str
    expert: Name | None = None
    experts: list[Name] | None = Field(default=None, min_length=2)
    """In place of ``expert``, several among which a gate chooses."""
    mixed: bool = False
    """Whether the gate mixes all experts of the task, which was trained together with it."""
    shared: Name | None = None
    """The expert that all rows of the task use in addition."""

    @model_validator(mode="after")
    def _served(self) -> Self:
        if (self.expert is None) == (self.experts is None):
            raise ValueError("needs either `expert` or `experts`")
        return self

    @property
    def served_by(self) -> list[str]:
        """The experts that serve the task, without the shared one."""
        return self.experts or [str(self.expert)]

    @property
    def used(self) -> list[str]:
        """All experts that the rows of the task use."""
        return [*self.served_by, *([] if self.shared is None else [self.shared])]


class _GateEntry(_Entry):
    """The settings by which every gate selects; see ``Selection``."""

    experts: list[Name] = Field(min_length=1)
    top_k: int = Field(ge=1)
    top_p: float | None = Field(gt=0, le=1)
    temperature: Temperature
    normalise: bool
    min_confidence: float = Field(ge=0, le=1)


class TextGateEntry(_GateEntry):
    """A gate that decides once a text."""

    type: Literal["sequence", "prototype"]
    block: int = Field(ge=0)
    """0-based index of the highest block that it reads."""
    pairs: int = Field(ge=0)
    """Number of token pairs that its familiarity knows."""
    groups: list[Annotated[list[Name], Field(min_length=1)]] = Field(default_factory=list)
    """Experts whose tasks are asked of the same texts, by group."""
    trunk_expert: Name | None = None
    """Expert whose states it reads; null reads the bare backbone."""
    familiarity_by_group: bool = False
    """Whether its familiarity has a calibration for each group, as those of versions from 0.2 have."""


class TokenGateEntry(_GateEntry):
    """A gate that decides for every token in every block."""

    type: Literal["token"]
    blocks: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    """0-based indices of the blocks with experts."""
    shortlist: int | None = Field(ge=1)


class Manifest(_Entry):
    """All that a valid manifest may hold."""

    format: int
    versions: dict[str, str]
    """Library to its version when the checkpoint was written."""
    backbone: BackboneEntry
    first_block: int = Field(ge=0)
    """Lowest block with an expert."""
    pooling: Literal["unit", "mean", "first", "last"]
    by_words: bool = False
    """Whether single texts are split into words before they become tokens, as in token classification."""
    passes: float | None = Field(default=None, ge=0)
    """Passes through the backbone for the answers of all tasks to one text; null in checkpoints before 0.3."""
    experts: dict[Name, ExpertEntry]
    tasks: dict[Name, TaskEntry]
    gate: Annotated[TextGateEntry | TokenGateEntry, Field(discriminator="type")] | None = None
    bytes: dict[FilePath, Annotated[int, Field(ge=0)]]
    """File to its size, for all files but this one and the scores."""
    sha256: dict[FilePath, Sha256] | None = None
    """File to the hash of its content; null in checkpoints of versions before 0.2."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        used = [expert for entry in self.tasks.values() for expert in entry.used]
        if isinstance(self.gate, TextGateEntry) and self.gate.trunk_expert is not None:
            used.append(self.gate.trunk_expert)
        problems = [f"it lacks the expert {name!r}" for name in used if name not in self.experts]
        problems += [f"it does not list the file {file!r}" for file in self._files() if file not in self.bytes]
        problems += [f"it lists the file {file!r}, but not what the file belongs to" for file in self._strays()]
        if self.sha256 is not None and self.sha256.keys() != self.bytes.keys():
            problems.append("`bytes` and `sha256` list different files")
        if problems:
            raise ValueError(problems[0])
        return self

    def _files(self) -> list[str]:
        """List the files that a checkpoint with these experts and tasks has in any case."""
        adapters = [
            f"experts/{name}/adapter_{end}" for name in self.experts for end in ("config.json", "model.safetensors")
        ]
        tasks = [file for name in self.tasks for file in (f"heads/{name}.safetensors", f"tasks/{name}.yaml")]
        return ["config.yaml", *adapters, *tasks, *([GATE] if self.gate is not None else [])]

    def _strays(self) -> list[str]:
        """List the files of experts, tasks and a gate that the manifest does not have."""
        known = {"experts": set(self.experts), "heads": set(self.tasks), "tasks": set(self.tasks)}
        strays = [GATE] if self.gate is None and GATE in self.bytes else []
        for file in self.bytes:
            folder, _, rest = file.partition("/")
            name = rest.partition("/")[0] if folder == "experts" else rest.rpartition(".")[0]
            if folder in known and name not in known[folder]:
                strays.append(file)
        return strays


class _Scores(BaseModel):
    """The scores of a task that are read again; more may stand beside them."""

    model_config = ConfigDict(strict=True)

    validation: float | None = None
    routing_accuracy: float | None = None
    split: str = ""
    n: int = 0
    metrics: dict[str, float | None] = Field(default_factory=dict)


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, and that all its files are as they were written.

    Raises:
        CheckpointError: If the folder is no checkpoint, is incomplete or changed, or was written by a newer version.
    """
    file = find_manifest(path)
    values = read_json_object(file, "it", error=partial(damaged, file))
    _check_format(path, values)
    manifest = parse_manifest(values, file)
    check_files(path, sizes=manifest.bytes, hashes=manifest.sha256)
    return manifest


def parse_manifest(values: Any, file: Path) -> Manifest:
    """Check the content of a manifest.

    Raises:
        CheckpointError: With every problem in it.
    """
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
        advice = " If a newer version wrote it, update sparse-ft" if unknown else ""
        raise damaged(file, (explain(error, Manifest) + advice).removesuffix(".")) from error


def find_manifest(path: Path) -> Path:
    """Return the path of a checkpoint's manifest, without reading it.

    Raises:
        CheckpointError: If the folder does not exist, cannot be read, or holds no manifest.
    """
    file, advice = path / MANIFEST, "Give the folder that `sparse-ft train` printed."
    try:
        if path.is_file():
            raise CheckpointError(f"Checkpoint folder {str(path)!r} is a file. {advice}")
        if not path.is_dir():
            raise _no_folder(path)
        if file.is_file():
            return file
        if (path / "resume").is_dir():
            advice = f"Its training did not finish: `sparse-ft train --resume --output {path}` continues it."
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"Checkpoint folder {str(path)!r} cannot be read: {error.strerror}.") from error
    raise CheckpointError(f"{str(path)!r} holds no {MANIFEST}, so it is no checkpoint. {advice}")


def _no_folder(path: Path) -> CheckpointError:
    """Return the error for a folder that does not exist, perhaps only during a save."""
    if old_path(path.absolute()).is_dir():
        return CheckpointError(
            f"Checkpoint folder {str(path)!r} is being replaced, or its last save was killed. Try again; if no run "
            f"writes it, `sparse-ft train --resume --output {path}` puts it back."
        )
    advice = similar_path(path, Path("runs")) or " Give the folder that `sparse-ft train` printed."
    return CheckpointError(f"Checkpoint folder {str(path)!r} does not exist.{advice}")


def _check_format(path: Path, values: Any) -> None:
    """Refuse a format that only newer versions read."""
    number = values.get("format") if isinstance(values, Mapping) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise damaged(path / MANIFEST, f"its format is {number!r}, expected {FORMAT}")
    if number > FORMAT:
        versions = values.get("versions")
        version = versions.get("sparse_ft") if isinstance(versions, Mapping) else "a newer version"
        raise CheckpointError(
            f"Checkpoint {str(path)!r} has format {number}; this sparse-ft {__version__} reads up to "
            f"{FORMAT}. It was written by sparse-ft {version}: update with `pip install -U sparse-ft`."
        )


def read_spec(file: Path) -> TaskSpec:
    """Read the file of a task, marked as foreign; versions that wrote no division drew the rows at random.

    Raises:
        CheckpointError: If it is no YAML.
        ConfigError: If it is no task.
    """
    spec = parse_task(read_yaml(file, "it", written=True, error=partial(damaged, file)), where=str(file))
    return spec.model_copy(update={"division": spec.division or UNRECORDED}).marked(foreign=True)


def read_config(file: Path) -> RunConfig:
    """Read the config of a run.

    Raises:
        CheckpointError: If it is damaged, or has settings that this version does not know.
    """
    values = read_yaml(file, "it", error=partial(damaged, file))
    if isinstance(values, dict) and isinstance(values.setdefault("data", {}), dict):
        values["data"].setdefault("division", "random")  # the rule of versions that did not write it
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(
            f"{str(file)!r} is not read by this version: {explain(error, RunConfig)} Update sparse-ft, or train again "
            "if the checkpoint is the older of the two."
        ) from error


def read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    """Read the scores of each task from when the checkpoint was written; empty without any."""
    file = path / "metrics.json"
    if not file.is_file():
        return {}

    def refusal(problem: str) -> CheckpointError:
        return CheckpointError(f"{str(file)!r} is damaged: {problem} Delete it; it holds scores only.")

    metrics = read_json_object(file, "it", error=refusal)
    try:
        for scores in metrics.values():
            _Scores.model_validate(scores)
    except ValidationError as error:
        raise refusal(explain(error, _Scores)) from error
    return metrics
