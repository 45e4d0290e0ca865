"""The state of a run that ``--resume`` continues: safetensors, JSON and YAML in ``<output>/resume``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparse_ft.backbone.encoding import Example
from sparse_ft.checkpoint.expert_files import read_tensors
from sparse_ft.checkpoint.folders import replace_folder, write_bytes, write_json
from sparse_ft.checkpoint.manifest import MANIFEST, read_config, read_metrics
from sparse_ft.config import RunConfig
from sparse_ft.documents import read_json_object
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.yaml_schema import yaml_text


@dataclass
class Progress:
    """The position of a run and its scores so far; plain values only."""

    pooling: str
    """Pooling of texts; a version that pools them otherwise cannot continue the run."""
    group: int = 0
    """Finished task groups; epoch, batch and step are counted anew for each."""
    epoch: int = 0
    batch: int = 0
    """Finished batches of this epoch."""
    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Tokens trained on, without padding."""
    seconds: float = 0.0
    """Time in training steps, over all sessions of the run."""
    best: dict[str, float] = field(default_factory=dict)
    """Best mean validation score of each task group."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Validation score of each task in the best state of its group; None for one without a value."""
    stale: dict[str, int] = field(default_factory=dict)
    """Evaluations of each task group since its best one."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Losses and scores of each epoch."""
    losses: dict[str, float] = field(default_factory=dict)
    """Sum of the losses of each task in this epoch."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of batches of each task in this epoch."""
    auxiliary: dict[str, float] = field(default_factory=dict)
    """Sum of each auxiliary loss in this epoch, in a joint run."""
    usage: dict[str, float] = field(default_factory=dict)
    """Sum of each expert's share of the weights of a batch in this epoch, in a joint run."""

    def add_losses(
        self, losses: Mapping[str, float], *, auxiliary: Mapping[str, float], usage: Mapping[str, float]
    ) -> None:
        """Add the losses of one batch to the sums of this epoch."""
        for sums, values in ((self.losses, losses), (self.auxiliary, auxiliary), (self.usage, usage)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        for task in losses:
            self.counts[task] = self.counts.get(task, 0) + 1

    def mean_losses(self) -> dict[str, float]:
        """Return the mean loss of each task in this epoch."""
        return {task: total / self.counts[task] for task, total in self.losses.items()}

    def batch_means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums over the batches of this epoch into means."""
        return {name: value / max(1, self.batch) for name, value in sums.items()}

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.losses, self.counts, self.auxiliary, self.usage = {}, {}, {}, {}

    def next_group(self) -> None:
        """Move to the start of the next task group."""
        self.group += 1
        self.epoch = self.batch = self.step = 0


@dataclass
class RunState:
    """Everything that a resumed run continues from, save the optimizer of the task group in training."""

    run: RunConfig
    output: Path
    """Folder of the run; its state is in ``output/resume``."""
    data: str
    """``fingerprint`` of the training and validation rows."""
    parameters: Mapping[str, nn.Parameter]
    """All parameters in training, by name."""
    best: dict[str, Tensor]
    """Their values in the best state so far."""
    progress: Progress

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the state in place of the last one."""
        tensors = {f"now/{name}": parameter.detach().cpu() for name, parameter in self.parameters.items()}
        tensors.update({f"best/{name}": tensor.cpu() for name, tensor in self.best.items()})
        for name, parameter in self.parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{key}/{name}"] = value.detach().cpu()
        tensors["rng/cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self._device)
        elif self._device.type == "mps":
            tensors["rng/mps"] = torch.mps.get_rng_state()

        def fill(folder: Path) -> None:
            contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
            write_bytes(folder / "state.safetensors", safetensors.torch.save(contiguous))
            write_bytes(folder / "config.yaml", yaml_text(self.run.model_dump()).encode())
            write_json(folder / "progress.json", {"data": self.data, **asdict(self.progress)})

        replace_folder(self.output / "resume", fill)

    def load_progress(self) -> None:
        """Continue at the position of the interrupted run.

        Raises:
            CheckpointError: If the state is damaged, or the training rows or the pooling have changed since.
        """
        values = _read_progress(self.output / "resume" / "progress.json")
        if values.pop("data") != self.data:
            raise CheckpointError(
                f"The training rows are not those of the interrupted run in {str(self.output)!r}: the data, the "
                "tokenizer or a teacher has changed. Put it back (give rows in memory again), or start anew in another "
                "--output."
            )
        if values["pooling"] != self.progress.pooling:
            raise CheckpointError(
                f"The interrupted run in {str(self.output)!r} reads texts by {values['pooling']} pooling, this version "
                f"by {self.progress.pooling}. Start anew in another --output."
            )
        self.progress = Progress(**values)

    def load_tensors(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore parameters, best values, optimizer and random numbers.

        Raises:
            CheckpointError: If the state is damaged.
        """
        folder = self.output / "resume"
        tensors = read_tensors(folder / "state.safetensors")
        lacking = [name for name in self.parameters if f"now/{name}" not in tensors]
        if lacking:
            raise CheckpointError(
                f"The state in {str(folder)!r} has no {lacking[0]!r}. It belongs to another run; start anew in another "
                "--output."
            )
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"now/{name}"])
            moments = {
                key: _like_adam(key, tensors[f"adam/{key}/{name}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam/{key}/{name}" in tensors
            }
            if moments:
                optimizer.state[parameter] = moments
        torch.set_rng_state(tensors["rng/cpu"])
        if self._device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self._device)
        elif self._device.type == "mps" and "rng/mps" in tensors:
            torch.mps.set_rng_state(tensors["rng/mps"])
        best = {name.removeprefix("best/"): tensor for name, tensor in tensors.items() if name.startswith("best/")}
        self.best = {name: tensor.to(self._device) for name, tensor in best.items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


def fingerprint(examples: Mapping[str, Sequence[Example]], *, teachers: Sequence[str] = ()) -> str:
    """Hash the rows of each task, and the manifests of the teachers, so that no run is continued on other data."""
    digest = hashlib.sha256()
    for teacher in teachers:
        digest.update((Path(teacher) / MANIFEST).read_bytes())
    for task, rows in examples.items():
        digest.update(f"{task}:{len(rows)}".encode())
        for row in rows:
            digest.update(repr((row.input_ids, row.targets)).encode())
    return digest.hexdigest()


def find_resume(output: Path) -> RunConfig:
    """Return the config of the unfinished run in a folder, or of a checkpoint that lacks only its scores.

    Raises:
        ConfigError: If there is neither.
    """
    folder = output / "resume"
    if (folder / "progress.json").is_file():
        return read_config(folder / "config.yaml")
    finished = (output / MANIFEST).is_file()
    if finished and unscored_tasks(output):
        return read_config(output / "config.yaml")
    if finished:
        reason = " It holds a finished checkpoint."
    else:
        reason = " If a run was killed before its first save, leave --resume out to start it anew."
    raise ConfigError(
        f"There is no unfinished run in {str(output)!r} to resume.{reason} "
        "Give --output with the folder of the interrupted run, or leave --resume out."
    )


def unscored_tasks(output: Path) -> list[str]:
    """Return the tasks of a checkpoint whose run was killed after it saved them and before it scored them."""
    return [task for task, entry in read_metrics(output).items() if "validation" in entry and "split" not in entry]


def _read_progress(file: Path) -> dict[str, Any]:
    known = {"data", *(field.name for field in fields(Progress))}

    def refusal(problem: str) -> CheckpointError:
        return CheckpointError(
            f"{str(file)!r} is damaged or of another version: {problem} Start anew in another --output; the run "
            "cannot be resumed."
        )

    values = read_json_object(file, "it", error=refusal)
    if set(values) != known:
        raise refusal(f"unknown or missing entries: {sorted(set(values) ^ known)}.")
    return values


def _like_adam(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    return value.to(parameter.device, value.dtype if key == "step" else parameter.dtype)
