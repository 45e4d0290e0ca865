"""The training loop: batches through one frozen backbone, one task group after another."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sparse_ft.backbone.batching import epoch_batches
from sparse_ft.backbone.encoding import Example
from sparse_ft.backbone.trunk import trunk_bytes
from sparse_ft.config import RunConfig
from sparse_ft.errors import SparseFTError
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.experts.inference import with_trunks
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.json_output import null_if_undefined
from sparse_ft.progress import progress_bar
from sparse_ft.training.gate_losses import alarms
from sparse_ft.training.gradients import Gradients
from sparse_ft.training.joint import FixedRouting, JointRouting, Rows, has_gate
from sparse_ft.training.parameters import TaskGroup, build_optimizer, task_groups
from sparse_ft.training.processes import gather_rows, rank
from sparse_ft.training.resume import Progress, RunState, fingerprint
from sparse_ft.training.training_task import TrainingTask

_LOG = logging.getLogger("sparse_ft")

_MAX_EVALUATIONS = 10
"""Most evaluations within ``train.min_steps`` steps; an epoch over few rows passes over them several times."""


def fit(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, run: RunConfig, output: Path, resume: bool
) -> Progress:
    """Train the experts and heads of tasks, and leave the model with the best state of each task group.

    Tasks without common parameters are trained one after another, each as in a run with one task. Tasks that share
    experts, as all do in a joint run, meet in the batches; the best state of such a group has the best mean score. The
    state is saved to ``output/resume`` every ``train.save_steps`` steps and after each epoch.

    Args:
        model: On its device, with experts and a head for each task.
        tasks: Training and validation rows by task name.
        run: The run's config.
        output: Folder of the run.
        resume: Continue from the state in ``output/resume``.

    Returns:
        The position at the end, with the history of losses and scores.

    Raises:
        SparseFTError: If a loss is not finite.
    """
    groups = task_groups(model, list(tasks), run=run)
    parameters = {name: value for group in groups.values() for name, value in group.parameters.items()}
    best = {name: value.detach().clone() for name, value in parameters.items()}
    rows = {name: [*task.examples, *task.validation.examples] for name, task in tasks.items()}
    data = fingerprint(rows, teachers=run.shared.teachers)
    state = RunState(run, output, data, parameters, best, Progress(model.pooling))
    if resume:
        state.load_progress()
    names = list(groups)
    for number in range(state.progress.group, len(names)):
        name = names[number]
        loop = _Loop(model, {task: tasks[task] for task in groups[name].tasks}, groups[name], name=name, state=state)
        torch.manual_seed(run.seed)
        if resume:
            state.load_tensors(loop.optimizer)
            resume = False
        try:
            loop.run_epochs(title="training" if len(names) == 1 else f"{name} ({number + 1} of {len(names)})")
        finally:
            loop.close()
        del loop  # frees its memory before the next group
        state.progress.next_group()
    return state.progress


class _Loop:
    """The training of one task group: its rows, parameters and optimizer."""

    def __init__(
        self,
        model: SparseExpertModel,
        tasks: Mapping[str, TrainingTask],
        group: TaskGroup,
        *,
        name: str,
        state: RunState,
    ) -> None:
        self.model, self.group, self.name, self.state = model, group, name, state
        self.run, self.progress = state.run, state.progress
        model.requires_grad_(False)
        model.backbone_dropout = self.run.train.backbone_dropout
        examples = {task: rows.examples for task, rows in tasks.items()}
        self.joint = JointRouting(model, examples, run=self.run) if has_gate(self.run) else None
        split = self.joint is None and any(model.tasks[task].gated for task in tasks)
        routing = FixedRouting(model, examples) if split else self.joint
        trunk_learns = any(name.startswith(f"{model.trunk_expert}/expert.") for name in group.parameters)
        limit = self.run.train.trunk_memory * 2**20
        self.tasks = _cache_trunks(model, tasks, limit=limit, trunk_learns=trunk_learns)
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = build_optimizer(group.parameters, self.run)
        self.optimizer.zero_grad()  # the first step is that of the run's batches alone, as in a resumed run
        self.gradients = Gradients(
            model, self.tasks, parameters=list(group.parameters.values()), run=self.run, routing=routing
        )
        self.lengths = {task: rows.num_tokens for task, rows in tasks.items()}
        self._plan_epochs()

    def _plan_epochs(self) -> None:
        """Decide how many passes over the rows an epoch has, and how many epochs there are."""
        settings = self.run.train
        self.passes = 1
        self.passes = math.ceil(settings.min_steps / _MAX_EVALUATIONS / len(self.plan(0))) or 1
        steps = len(self.plan(0))
        self.epochs = max(math.ceil(settings.epochs / self.passes), math.ceil(settings.min_steps / steps))
        self.total_steps = self.epochs * steps
        passes = self.epochs * self.passes
        if passes > settings.epochs and settings.min_steps and rank() == 0:
            rows = sum(map(len, self.lengths.values()))
            _LOG.info(
                "%s: up to %d passes over the %d rows, in place of train.epochs=%d, to reach train.min_steps=%d. "
                "Set train.epochs to choose the number of passes.",
                self.name, passes, rows, settings.epochs, settings.min_steps,
            )  # fmt: skip

    def plan(self, epoch: int) -> list[list[tuple[str, int]]]:
        """Return the batches of an epoch: one pass over the rows, or several passes over few rows."""
        return [
            batch
            for number in range(epoch * self.passes, (epoch + 1) * self.passes)
            for batch in epoch_batches(
                self.lengths,
                batch_size=self.run.train.batch_size,
                mixture=self.run.train.mixture,
                seed=self.run.seed,
                epoch=number,
                across_tasks=self.model.backbone.family.routes_rows,
            )
        ]

    def run_epochs(self, *, title: str) -> None:
        """Train to the end, and leave the model with the best state."""
        progress = self.progress
        shown = title if rank() == 0 else None
        with progress_bar(shown, total=self.total_steps, initial=progress.step, unit="step", phase=False) as bar:
            while progress.epoch < self.epochs and not self._patience_is_out():
                self.model.train()
                batches = self.plan(progress.epoch)
                while progress.batch < len(batches):
                    self.step(batches[progress.batch])
                    bar.update()
                    bar.set_postfix(_postfix(progress), refresh=False)
                    if progress.step % self.run.train.save_steps == 0 and progress.batch < len(batches):
                        self.save()
                self.end_epoch()
                bar.set_postfix(_postfix(progress))
                self.save()
        if progress.epoch < self.epochs and rank() == 0:
            _LOG.info(
                "Training of %s stopped early at step %d of %d: its last %d evaluations were no better than the best "
                "(train.patience).", self.name, progress.step, self.total_steps, self.run.train.patience,
            )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.group.parameters.items():
                parameter.copy_(self.state.best[name])

    def step(self, batch: Rows) -> None:
        """Take one optimizer step on a batch."""
        started = time.perf_counter()
        settings, progress = self.run.train, self.progress
        factor = _rate(progress.step, total=self.total_steps, warmup=settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        teacher_weight = self.run.shared.teacher_weight * (1 - progress.step / self.total_steps)
        losses = self.gradients.add(batch, step=progress.step, teacher_weight=teacher_weight)
        self.group.sum_tied()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.group.parameters.values(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._check_finite(losses.tasks)
        usage = {}
        if self.joint is not None and losses.usage is not None:
            usage = dict(zip(self.joint.names, losses.usage.tolist(), strict=True))
        progress.add_losses(losses.tasks, auxiliary=losses.gate, usage=usage)
        progress.step += 1
        progress.batch += 1
        progress.tokens += sum(self.lengths[task][group] for task, group in batch)
        progress.seconds += time.perf_counter() - started

    def _check_finite(self, losses: Mapping[str, float]) -> None:
        rate = self.run.train.learning_rate
        for task, loss in losses.items():
            if not math.isfinite(loss):
                raise SparseFTError(
                    f"The loss of task {task!r} became {loss} at step {self.progress.step + 1}. Lower "
                    f"train.learning_rate (now {rate}), e.g. --set train.learning_rate={rate / 4:g}."
                )

    def end_epoch(self) -> None:
        """Score each task on its validation rows, keep the best state, and move to the next epoch."""
        self.model.eval()
        progress = self.progress
        scores = {name: self._validation_score(task) for name, task in self.tasks.items()}
        finite = [value if math.isfinite(value) else -1.0 for value in scores.values()]  # a correlation with a constant
        score = sum(finite) / len(finite)
        best = progress.best.get(self.name, -math.inf)
        progress.stale[self.name] = 0 if score > best else progress.stale.get(self.name, 0) + 1
        if score >= best:  # of equal scores the latest: few validation rows tie early
            progress.best[self.name] = score
            progress.scores.update(null_if_undefined(scores))
            for name, parameter in self.group.parameters.items():
                self.state.best[name] = parameter.detach().clone()
        entry = {"epoch": progress.epoch + 1, "step": progress.step, "loss": progress.mean_losses()}
        progress.history.append({**entry, "validation": null_if_undefined(scores), **self._gate_report()})
        progress.next_epoch()

    def _validation_score(self, task: TrainingTask) -> float:
        rows = task.validation
        predictions = gather_rows(rows.num_rows, lambda part: predict_rows(self.model, task.spec, rows.take(part)))
        return score_rows(task.spec, rows, predictions).metrics[task.spec.metric]

    def _gate_report(self) -> dict[str, dict[str, float]]:
        """Return the auxiliary losses and the use of the experts in this epoch, and warn of a collapse."""
        if self.joint is None:
            return {}
        progress = self.progress
        usage = progress.batch_means(progress.usage)
        rows = None if self.run.experts.pool else self._row_shares(self.joint.names)
        for alarm in alarms(usage, settings=self.run.gate, rows=rows):
            _LOG.warning("Epoch %d: %s", progress.epoch + 1, alarm)
        return {"auxiliary": progress.batch_means(progress.auxiliary), "usage": usage}

    def _row_shares(self, names: Sequence[str]) -> dict[str, float]:
        """Return, for each expert, the share of this epoch's rows whose task it serves."""
        drawn = Counter(task for batch in self.plan(self.progress.epoch) for task, _ in batch)
        experts = {task: self.model.tasks[task].experts for task in drawn}
        return {
            name: sum(count / drawn.total() for task, count in drawn.items() if name in experts[task]) for name in names
        }

    def _patience_is_out(self) -> bool:
        patience = self.run.train.patience
        return patience > 0 and self.progress.stale.get(self.name, 0) >= patience

    def save(self) -> None:
        """Save the state of the run, in rank 0."""
        if rank() == 0:
            self.state.save(self.optimizer)

    def close(self) -> None:
        """Freeze all parameters, and end the threads."""
        self.model.requires_grad_(False).eval()
        self.gradients.close()


def _cache_trunks(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, limit: int, trunk_learns: bool
) -> Mapping[str, TrainingTask]:
    """Compute the states that all tasks share once for all rows, if they fit into ``limit`` bytes and never change."""
    backbone = model.backbone
    if model.parting_block == 0 or not backbone.family.caches_trunk or model.backbone_dropout:
        return tasks
    if trunk_learns or not all(map(model.on_trunk, tasks)):
        return tasks
    rows = [example for task in tasks.values() for example in (*task.examples, *task.validation.examples)]
    if trunk_bytes(backbone, rows) > limit:
        return tasks

    def cache(examples: list[Example]) -> list[Example]:
        return with_trunks(model, examples, expert=model.trunk_expert, title="below the experts")

    return {
        name: replace(
            task,
            examples=cache(task.examples),
            validation=replace(task.validation, examples=cache(task.validation.examples)),
        )
        for name, task in tasks.items()
    }


def _rate(step: int, *, total: int, warmup: float) -> float:
    """Return the factor on the learning rate, which rises linearly, and then falls linearly towards 0."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return (total - step) / max(1, total - rising)


def _postfix(progress: Progress) -> dict[str, str]:
    """Show the loss of each task in this epoch, its last validation score, and how a gate uses the experts."""
    last = progress.history[-1] if progress.history else {}
    losses = progress.mean_losses() or last.get("loss", {})
    scores = {task: score for task, score in last.get("validation", {}).items() if score is not None}
    shown = {task: f"{loss:.3f}" + (f"/{scores[task]:.3f}" if task in scores else "") for task, loss in losses.items()}
    usage = progress.batch_means(progress.usage) or last.get("usage", {})
    if usage:
        shown["usage"] = " ".join(f"{share:.0%}" for share in usage.values())
    return shown
