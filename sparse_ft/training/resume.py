"""What a training run needs to go on where it was killed: safetensors, JSON and YAML in ``<output>/resume``."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from sparse_ft.backbone.encoding import Example
from sparse_ft.checkpoint.expert_files import read_tensors
from sparse_ft.checkpoint.folders import recover_folder, replace_folder, write_bytes, write_json
from sparse_ft.checkpoint.manifest import read_config
from sparse_ft.config import RunConfig
from sparse_ft.errors import CheckpointError, ConfigError


@dataclass
class Progress:
    """Where a run stands; plain values only."""

    pooling: str
    """How the run reads texts; a version that would read them otherwise cannot go on with it."""
    group: int = 0
    """Groups of tasks that are done; epoch, batch and step are counted anew for each."""
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Real tokens trained on."""
    seconds: float = 0.0
    """Spent in training steps, over all sessions of the run."""
    best: dict[str, float] = field(default_factory=dict)
    """Best validation score of each group: of a task, or the mean over all in a joint run."""
    scores: dict[str, float] = field(default_factory=dict)
    """Validation score of each task where its group was best."""
    stale: dict[str, int] = field(default_factory=dict)
    """Evaluations since the best one."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Loss and scores of each epoch."""
    losses: dict[str, float] = field(default_factory=dict)
    """Sum of the task losses of this epoch."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of batches in ``losses``."""
    auxiliary: dict[str, float] = field(default_factory=dict)
    """Sum of the gate's losses of this epoch, in a joint run."""
    usage: dict[str, float] = field(default_factory=dict)
    """Sum of each expert's share of the weights of a batch, in a joint run."""

    def next_group(self) -> None:
        """Stand at the beginning of the next group."""
        self.group += 1
        self.epoch = self.batch = self.step = 0


def fingerprint(examples: Mapping[str, Sequence[Example]]) -> str:
    """Hash what is trained on, so that a run is not continued on other data."""
    digest = hashlib.sha256()
    for task, rows in examples.items():
        digest.update(f"{task}:{len(rows)}".encode())
        for row in rows:
            digest.update(repr((row.input_ids, row.targets)).encode())
    return digest.hexdigest()


def save_resume(
    output: Path,
    *,
    config: RunConfig,
    data: str,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write the state of a run in place of the last one.

    Args:
        output: Folder of the run; the state goes to ``output/resume``.
        config: The run's config, which --resume takes over.
        data: ``fingerprint`` of the training rows.
        progress: Where the run stands.
        parameters: All trainable tensors by name.
        optimizer: AdamW over those of the group in training.
        best: The best tensors so far, by the same names.
    """
    tensors = {f"now/{name}": parameter.detach().cpu() for name, parameter in parameters.items()}
    tensors.update({f"best/{name}": tensor.cpu() for name, tensor in best.items()})
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam/{key}/{name}"] = value.detach().cpu()
    tensors["rng/cpu"] = torch.get_rng_state()
    device = _device_of(parameters)
    if device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        tensors["rng/mps"] = torch.mps.get_rng_state()

    def fill(folder: Path) -> None:
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_bytes(folder / "state.safetensors", safetensors.torch.save(contiguous))
        write_bytes(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
        write_json(folder / "progress.json", {"data": data, **asdict(progress)})

    replace_folder(output / "resume", fill)


def find_resume(output: Path) -> RunConfig:
    """Return the config of the unfinished run in a folder.

    Raises:
        ConfigError: If there is none.
    """
    folder = output / "resume"
    recover_folder(output)
    recover_folder(folder)
    if not (folder / "progress.json").is_file():
        done = " It holds a finished checkpoint." if (output / "manifest.json").is_file() else ""
        raise ConfigError(
            f"There is no unfinished run in {str(output)!r} to resume.{done} "
            "Give --output with the folder of the interrupted run, or leave --resume out."
        )
    return read_config(folder / "config.yaml")


def read_progress(output: Path, *, data: str, pooling: str) -> Progress:
    """Return where the run stood.

    Args:
        output: Folder of the run.
        data: ``fingerprint`` of the training rows.
        pooling: Of the model.

    Raises:
        CheckpointError: If the state is damaged, or the training rows or the pooling have changed since.
    """
    values = _read_progress(output / "resume" / "progress.json")
    if values.pop("data") != data:
        raise CheckpointError(
            f"The training rows are not those of the interrupted run in {str(output)!r}: the data or the tokenizer has "
            "changed. Put the old data back, or start anew in another --output."
        )
    if values["pooling"] != pooling:
        raise CheckpointError(
            f"The interrupted run in {str(output)!r} reads texts by {values['pooling']} pooling, this version by "
            f"{pooling}. Start anew in another --output."
        )
    return Progress(**values)


def load_resume(
    output: Path, *, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Put parameters, optimizer and random numbers back to where the run was.

    Args:
        output: Folder of the run.
        parameters: All trainable tensors by name.
        optimizer: AdamW over those of the group in training.

    Returns:
        The best tensors so far, by the same names.

    Raises:
        CheckpointError: If the state is damaged.
    """
    folder = output / "resume"
    tensors = read_tensors(folder / "state.safetensors")
    lacking = [name for name in parameters if f"now/{name}" not in tensors]
    if lacking:
        raise CheckpointError(
            f"The state in {str(folder)!r} has no {lacking[0]!r}. It belongs to another run; start anew in another "
            "--output."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"now/{name}"])
            state = {
                key: _like_adam(key, tensors[f"adam/{key}/{name}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam/{key}/{name}" in tensors
            }
            if state:
                optimizer.state[parameter] = state
    torch.set_rng_state(tensors["rng/cpu"])
    device = _device_of(parameters)
    if device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
    elif device.type == "mps" and "rng/mps" in tensors:
        torch.mps.set_rng_state(tensors["rng/mps"])
    return {name.removeprefix("best/"): tensor for name, tensor in tensors.items() if name.startswith("best/")}


def _device_of(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    return next(iter(parameters.values())).device


def _read_progress(file: Path) -> dict[str, Any]:
    known = {"data", *(field.name for field in fields(Progress))}
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
        if set(values) != known:
            raise ValueError(f"unknown or missing entries: {sorted(set(values) ^ known)}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged or of another version: {error}. Start anew in another --output; the run cannot "
            "be resumed."
        ) from error
    return values


def _like_adam(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    return value.to(parameter.device, value.dtype if key == "step" else parameter.dtype)
