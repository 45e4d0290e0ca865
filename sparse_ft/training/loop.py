"""The training loop: batches through one frozen backbone, of one task after the other, or of all that share experts."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparse_ft.backbone.batching import epoch_batches
from sparse_ft.backbone.encoding import Example
from sparse_ft.backbone.trunk import keep_trunk, trunk_bytes
from sparse_ft.config import RunConfig
from sparse_ft.errors import SparseFTError
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.training.gate_losses import alarms
from sparse_ft.training.gradients import Gradients
from sparse_ft.training.joint import Domains, Mixing, Pairs, has_gate
from sparse_ft.training.parameters import Group, build_optimizer, find_groups
from sparse_ft.training.processes import gather_rows, rank
from sparse_ft.training.resume import Progress, fingerprint, load_resume, read_progress, save_resume
from sparse_ft.training.training_task import TrainingTask

_LOG = logging.getLogger("sparse_ft")

_EPOCHS = 10
"""Evaluations that ``train.min_steps`` steps have at most: few rows are passed over several times between two."""


def fit(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, run: RunConfig, output: Path, resume: bool
) -> Progress:
    """Train the experts and heads of some tasks; leaves the model with the best state of each.

    Tasks that have nothing in common which learns are trained one after the other, each as in a run of its own. Those
    that share experts, as all do in a joint run, meet in the batches, and their best state is that of the best mean
    score. The state is saved to ``output/resume`` every ``train.save_steps`` steps and after each epoch.

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
    accelerator = Accelerator(mixed_precision="no", device_placement=False)  # precision is that of the frozen weights
    state = _State.start(model, tasks, run=run, output=output)
    if resume:
        state.progress = read_progress(output, data=state.data, pooling=model.pooling)
    progress, names = state.progress, list(state.groups)
    while progress.group < len(names):
        name = names[progress.group]
        loop = _Loop(model, tasks, name=name, state=state, accelerator=accelerator)
        torch.manual_seed(run.seed)
        if resume:
            loop.load()
            resume = False
        try:
            loop.run_epochs(title="training" if len(names) == 1 else f"{name} ({progress.group + 1} of {len(names)})")
        finally:
            loop.close()
        del loop  # before the next one takes its memory
        progress.next_group()
    return progress


@dataclass
class _State:
    """What is of the whole run: all that learns, its best values so far, and where the run stands."""

    run: RunConfig
    output: Path
    data: str
    groups: dict[str, Group]
    parameters: dict[str, nn.Parameter]
    best: dict[str, Tensor]
    progress: Progress

    @classmethod
    def start(
        cls, model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, run: RunConfig, output: Path
    ) -> "_State":
        groups = find_groups(model, list(tasks), run=run)
        parameters = {name: value for group in groups.values() for name, value in group.parameters.items()}
        best = {name: value.detach().clone() for name, value in parameters.items()}
        data = fingerprint({name: [*task.examples, *task.validation.examples] for name, task in tasks.items()})
        return cls(run, output, data, groups, parameters, best, Progress(model.pooling))


class _Loop:
    """The training of one group: its rows, parameters and optimizer."""

    def __init__(
        self,
        model: SparseExpertModel,
        tasks: Mapping[str, TrainingTask],
        *,
        name: str,
        state: _State,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.name, self.state, self.run, self.progress = model, name, state, state.run, state.progress
        self.accelerator, self.group = accelerator, state.groups[name]
        run, tasks = state.run, {task: tasks[task] for task in self.group.tasks}
        model.requires_grad_(False)
        model.backbone_dropout = run.train.backbone_dropout
        examples = {task: rows.examples for task, rows in tasks.items()}
        self.mixing = Mixing(model, examples, run=run) if has_gate(run) else None
        domains = self.mixing is None and any(model.tasks[task].gated for task in tasks)
        self.tasks = _keep_trunks(model, tasks, limit=run.train.trunk_memory * 2**20)
        for parameter in self.group.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = accelerator.prepare(build_optimizer(self.group.parameters, run))
        self.lengths = {
            task: [sum(len(rows.examples[place].input_ids) for place in unit) for unit in rows.units]
            for task, rows in tasks.items()
        }
        self.gradients = Gradients(
            model,
            self.tasks,
            parameters=list(self.group.parameters.values()),
            run=run,
            accelerator=accelerator,
            mixing=Domains(model, examples) if domains else self.mixing,
        )
        self.passes = 1
        self.passes = math.ceil(run.train.min_steps / _EPOCHS / len(self.plan(0))) or 1
        steps_per_epoch = len(self.plan(0))
        wanted = math.ceil(run.train.epochs / self.passes)
        self.epochs = max(wanted, math.ceil(run.train.min_steps / steps_per_epoch))
        self.total_steps = self.epochs * steps_per_epoch

    def run_epochs(self, *, title: str) -> None:
        """Train to the end, and leave the model with the best state."""
        progress, settings = self.progress, self.run.train
        shown = {"desc": title, "unit": "step", "mininterval": 0.5, "disable": rank() > 0}
        with tqdm(total=self.total_steps, initial=progress.step, **shown) as bar:
            while progress.epoch < self.epochs and not self._patience_is_out():
                self.model.train()
                batches = self.plan(progress.epoch)
                while progress.batch < len(batches):
                    self.step(batches[progress.batch])
                    bar.update()
                    bar.set_postfix(_postfix(progress), refresh=False)
                    if progress.step % settings.save_steps == 0 and progress.batch < len(batches):
                        self.save()
                self.end_epoch()
                bar.set_postfix(_postfix(progress))
                self.save()
        with torch.no_grad():
            for name, parameter in self.group.parameters.items():
                parameter.copy_(self.state.best[name])

    def plan(self, epoch: int) -> list[list[tuple[str, int]]]:
        """Return the batches between two evaluations: one pass over the rows, or several over few rows."""
        return [
            batch
            for number in range(epoch * self.passes, (epoch + 1) * self.passes)
            for batch in epoch_batches(
                self.lengths,
                batch_size=self.run.train.batch_size,
                mixture=self.run.train.mixture,
                seed=self.run.seed,
                epoch=number,
                mix_tasks=self.model.backbone.family.routes_rows,
            )
        ]

    def step(self, pairs: Pairs) -> None:
        """Take one optimizer step on a batch, computed in parts if ``train.accumulation`` asks for it."""
        started = time.perf_counter()
        settings, progress = self.run.train, self.progress
        factor = _rate(progress.step, total=self.total_steps, warmup=settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        told = self.gradients.add(pairs, step=progress.step)
        self.group.sum_tied()
        if settings.clip:
            self.accelerator.clip_grad_norm_(self.group.parameters.values(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for task, loss in told.losses.items():
            if not math.isfinite(loss):
                raise SparseFTError(
                    f"The loss of task {task!r} became {loss} at step {progress.step + 1}. Lower train.learning_rate "
                    f"(now {settings.learning_rate}), e.g. --set train.learning_rate={settings.learning_rate / 4:g}."
                )
            progress.losses[task] = progress.losses.get(task, 0.0) + loss
            progress.counts[task] = progress.counts.get(task, 0) + 1
        if self.mixing is not None and told.usage is not None:
            shares = dict(zip(self.mixing.names, told.usage.tolist(), strict=True))
            for sums, values in ((progress.auxiliary, told.auxiliary), (progress.usage, shares)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
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
            predictions = self._predicted(task)
            scores[name] = score_rows(task.spec, task.validation, predictions).metrics[task.spec.metric]
        finite = [value if math.isfinite(value) else -1.0 for value in scores.values()]  # a correlation with a constant
        score = sum(finite) / len(finite)
        best = progress.best.get(self.name, -math.inf)
        progress.stale[self.name] = 0 if score > best else progress.stale.get(self.name, 0) + 1
        if score >= best:  # of equals the one that has learnt longest: few validation rows tie early
            progress.best[self.name] = score
            progress.scores.update(scores)
            for name, parameter in self.group.parameters.items():
                self.state.best[name] = parameter.detach().clone()
        mixture = {}
        if self.mixing is not None:
            usage = _shares(progress)
            mixture = {"auxiliary": _per_batch(progress, progress.auxiliary), "usage": usage}
            rows = None if self.run.experts.pool else self._rows_of_experts(self.mixing.names)
            for alarm in alarms(usage, settings=self.run.gate, rows=rows):
                _LOG.warning("Epoch %d: %s", progress.epoch + 1, alarm)
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "step": progress.step,
                "loss": _mean_losses(progress),
                "validation": scores,
                **mixture,
            }
        )
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.losses, progress.counts, progress.auxiliary, progress.usage = {}, {}, {}, {}

    def _rows_of_experts(self, names: Sequence[str]) -> dict[str, float]:
        """Return the share of the rows of an epoch that are of the task of each expert."""
        drawn = Counter(task for batch in self.plan(self.progress.epoch) for task, _ in batch)
        experts = {task: self.model.tasks[task].experts for task in drawn}
        return {
            name: sum(count / drawn.total() for task, count in drawn.items() if name in experts[task]) for name in names
        }

    def _predicted(self, task: TrainingTask) -> list[Any]:
        """Predict the validation rows of a task."""
        return gather_rows(
            task.validation.num_rows, lambda rows: predict_rows(self.model, task.spec, task.validation.take(rows))
        )

    def _patience_is_out(self) -> bool:
        patience = self.run.train.patience
        return patience > 0 and self.progress.stale.get(self.name, 0) >= patience

    def close(self) -> None:
        """Let the threads end, nothing learn, and the optimizer go, which accelerate would keep to the end."""
        self.model.requires_grad_(False).eval()
        self.accelerator.free_memory()
        self.gradients.close()

    def save(self) -> None:
        if rank() > 0:
            return
        save_resume(
            self.state.output,
            config=self.run,
            data=self.state.data,
            progress=self.progress,
            parameters=self.state.parameters,
            optimizer=self.optimizer,
            best=self.state.best,
        )

    def load(self) -> None:
        """Put back the tensors and the random numbers; the position was read before."""
        best = load_resume(self.state.output, parameters=self.state.parameters, optimizer=self.optimizer)
        self.state.best = {name: tensor.to(self.model.device) for name, tensor in best.items()}


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


def _rate(step: int, *, total: int, warmup: float) -> float:
    """Give the factor on the learning rate: rising linearly, then falling linearly towards 0."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return (total - step) / max(1, total - rising)


def _mean_losses(progress: Progress) -> dict[str, float]:
    return {task: total / progress.counts[task] for task, total in progress.losses.items()}


def _per_batch(progress: Progress, sums: Mapping[str, float]) -> dict[str, float]:
    """Turn sums over the batches of this epoch into means."""
    return {name: value / max(1, progress.batch) for name, value in sums.items()}


def _shares(progress: Progress) -> dict[str, float]:
    return _per_batch(progress, progress.usage)


def _postfix(progress: Progress) -> dict[str, str]:
    """Show the loss of each task over this epoch and its last validation score, and how a gate uses the experts."""
    last = progress.history[-1] if progress.history else {}
    losses = _mean_losses(progress) or last.get("loss", {})
    scores = last.get("validation", {})
    shown = {task: f"{loss:.3f}" + (f"/{scores[task]:.3f}" if task in scores else "") for task, loss in losses.items()}
    usage = _shares(progress) or last.get("usage", {})
    if usage:
        shown["usage"] = " ".join(f"{share:.0%}" for share in usage.values())
    return shown
