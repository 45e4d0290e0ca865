"""The training loop: batches of several tasks through one frozen backbone, each task with its own expert and head."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from sparse_ft.batching import epoch_batches
from sparse_ft.config import RunConfig
from sparse_ft.encoding import Example
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.evaluation import predict_rows, score_rows
from sparse_ft.gradients import Gradients, Pairs
from sparse_ft.model import SparseExpertModel
from sparse_ft.resume import Progress, fingerprint, load_resume, save_resume
from sparse_ft.training_data import TrainingTask
from sparse_ft.trunk import keep_trunk, trunk_bytes


def fit(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, run: RunConfig, output: Path, resume: bool
) -> Progress:
    """Train the experts and heads of some tasks; leaves the model with the best state of each.

    Every step is one batch; the rows of a task reach its expert and head only, so tasks trained together do not disturb
    each other. The state is saved to ``output/resume`` every ``train.save_steps`` steps and after each epoch.

    Args:
        model: On its device; has an expert and a head for each task.
        tasks: Training and validation rows by task name.
        run: The run's config.
        output: Folder of the run.
        resume: Go on from the state saved in ``output/resume``.

    Returns:
        Where the run ended, with the history of losses and scores.

    Raises:
        SparseFTError: If the loss is no longer finite.
    """
    accelerator = Accelerator(cpu=model.device.type == "cpu", device_placement=False)
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"Training runs in one process, not in {accelerator.num_processes}. "
            "Start it with `sparse-ft train`, without a launcher."
        )
    loop = _Loop(model, tasks, run=run, output=output, accelerator=accelerator)
    torch.manual_seed(run.seed)
    if resume:
        loop.load()
    progress, settings = loop.progress, run.train
    with tqdm(total=loop.total_steps, initial=progress.step, desc="training", unit="step", mininterval=0.5) as bar:
        while progress.epoch < loop.epochs and not _patience_is_out(progress, settings.patience):
            model.train()
            batches = loop.plan(progress.epoch)
            while progress.batch < len(batches):
                loop.step(batches[progress.batch])
                bar.update()
                bar.set_postfix(_postfix(progress), refresh=False)
                if progress.step % settings.save_steps == 0 and progress.batch < len(batches):
                    loop.save()
            loop.end_epoch()
            bar.set_postfix(_postfix(progress))
            loop.save()
    loop.take_best()
    return progress


class _Loop:
    """The state of a training run: parameters, optimizer, position, and the best tensors so far."""

    def __init__(
        self,
        model: SparseExpertModel,
        tasks: Mapping[str, TrainingTask],
        *,
        run: RunConfig,
        output: Path,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.run, self.output = model, run, output
        self.accelerator = accelerator
        model.requires_grad_(False)
        model.backbone_dropout = run.train.backbone_dropout
        self.tasks = _keep_trunks(model, tasks, limit=run.train.trunk_memory * 2**20)
        self.groups = {task: model.trainable(task) for task in tasks}
        self.parameters = {
            f"{task}/{name}": value for task, group in self.groups.items() for name, value in group.items()
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = accelerator.prepare(_optimizer(self.parameters, run))
        self.lengths = {name: [len(row.input_ids) for row in task.examples] for name, task in tasks.items()}
        self.data = fingerprint({name: [*task.examples, *task.validation.examples] for name, task in tasks.items()})
        self.gradients = Gradients(
            model, self.tasks, parameters=list(self.parameters.values()), run=run, accelerator=accelerator
        )
        self.progress = Progress()
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        steps_per_epoch = len(self.plan(0))
        self.epochs = max(run.train.epochs, math.ceil(run.train.min_steps / steps_per_epoch))
        self.total_steps = self.epochs * steps_per_epoch

    def plan(self, epoch: int) -> list[list[tuple[str, int]]]:
        return epoch_batches(
            self.lengths,
            batch_size=self.run.train.batch_size,
            mixture=self.run.train.mixture,
            seed=self.run.seed,
            epoch=epoch,
            mix_tasks=self.model.backbone.family.routes_rows,
        )

    def step(self, pairs: Pairs) -> None:
        """Take one optimizer step on a batch, computed in parts if ``train.accumulation`` asks for it."""
        started = time.perf_counter()
        settings, progress = self.run.train, self.progress
        factor = _rate(progress.step, total=self.total_steps, warmup=settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        losses = self.gradients.add(pairs, step=progress.step)
        for group in self.groups.values():
            if settings.clip:
                self.accelerator.clip_grad_norm_(group.values(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for task, loss in losses.items():
            if not math.isfinite(loss):
                raise SparseFTError(
                    f"The loss of task {task!r} became {loss} at step {progress.step + 1}. Lower train.learning_rate "
                    f"(now {settings.learning_rate}), e.g. --set train.learning_rate={settings.learning_rate / 4:g}."
                )
            progress.losses[task] = progress.losses.get(task, 0.0) + loss
            progress.counts[task] = progress.counts.get(task, 0) + 1
        progress.step += 1
        progress.batch += 1
        progress.tokens += sum(self.lengths[task][row] for task, row in pairs)
        progress.seconds += time.perf_counter() - started

    def end_epoch(self) -> None:
        """Score each task on its validation rows, keep its best state, and move on to the next epoch."""
        self.model.eval()
        progress = self.progress
        scores: dict[str, float] = {}
        for name, task in self.tasks.items():
            predictions = predict_rows(self.model, task.spec, task.validation)
            score = score_rows(task.spec, task.validation, predictions).metrics[task.spec.metric]
            scores[name] = score
            progress.stale[name] = progress.stale.get(name, 0) + 1
            if score > progress.best.get(name, -math.inf):
                progress.best[name], progress.stale[name] = score, 0
                for part, parameter in self.groups[name].items():
                    self.best[f"{name}/{part}"] = parameter.detach().clone()
        progress.history.append(
            {"epoch": progress.epoch + 1, "step": progress.step, "loss": _mean_losses(progress), "validation": scores}
        )
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.losses, progress.counts = {}, {}

    def take_best(self) -> None:
        """Give every parameter the value it had when its task scored best."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        self.model.requires_grad_(False).eval()
        self.gradients.close()

    def save(self) -> None:
        save_resume(
            self.output,
            config=self.run,
            data=self.data,
            progress=self.progress,
            parameters=self.parameters,
            optimizer=self.optimizer,
            best=self.best,
        )

    def load(self) -> None:
        self.progress, best = load_resume(
            self.output, data=self.data, parameters=self.parameters, optimizer=self.optimizer
        )
        self.best = {name: tensor.to(self.model.device) for name, tensor in best.items()}


def _keep_trunks(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, limit: int
) -> Mapping[str, TrainingTask]:
    """Run all rows through what lies below the experts, once, if the result fits into ``limit`` bytes."""
    backbone, first_block = model.backbone, model.first_block
    if first_block == 0 or not backbone.family.keeps_trunk or model.backbone_dropout:
        return tasks
    rows = [example for task in tasks.values() for example in (*task.examples, *task.validation.examples)]
    dtype = next(backbone.model.parameters()).dtype
    if trunk_bytes(rows, hidden_size=backbone.hidden_size, dtype=dtype) > limit:
        return tasks

    def keep(examples: list[Example]) -> list[Example]:
        return keep_trunk(backbone.model, backbone.blocks, examples, first_block=first_block, pad_id=backbone.pad_id)

    return {
        name: replace(
            task,
            examples=keep(task.examples),
            validation=replace(task.validation, examples=keep(task.validation.examples)),
        )
        for name, task in tasks.items()
    }


def _optimizer(parameters: Mapping[str, nn.Parameter], run: RunConfig) -> torch.optim.AdamW:
    settings = run.train
    rates = {"expert.": settings.learning_rate, "head.": settings.head_learning_rate or settings.learning_rate}
    groups = [
        {
            "params": [value for name, value in parameters.items() if name.partition("/")[2].startswith(part)],
            "lr": rate,
            "base_lr": rate,
        }
        for part, rate in rates.items()
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def _rate(step: int, *, total: int, warmup: float) -> float:
    """Give the factor on the learning rate: rising linearly, then falling linearly towards 0."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return (total - step) / max(1, total - rising)


def _patience_is_out(progress: Progress, patience: int) -> bool:
    return patience > 0 and bool(progress.stale) and min(progress.stale.values()) >= patience


def _mean_losses(progress: Progress) -> dict[str, float]:
    return {task: total / progress.counts[task] for task, total in progress.losses.items()}


def _postfix(progress: Progress) -> dict[str, str]:
    """Show the loss of each task over this epoch and its last validation score."""
    losses = _mean_losses(progress) or (progress.history[-1]["loss"] if progress.history else {})
    scores = progress.history[-1]["validation"] if progress.history else {}
    return {task: f"{loss:.3f}" + (f"/{scores[task]:.3f}" if task in scores else "") for task, loss in losses.items()}
