"""The gradients of a batch, computed in parts: one after another to save memory, or side by side to save time."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Example
from sparse_ft.config import RunConfig
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import named_generator
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.training.joint import FixedRouting, JointRouting, Rows
from sparse_ft.training.processes import all_reduce_gradients, gather, is_distributed, rank, world_size
from sparse_ft.training.teachers import distillation_loss
from sparse_ft.training.training_task import TrainingTask, TransferExample

_MIN_ROWS = 8
"""Fewest rows of a part in a joint run, if there are few experts."""


@dataclass
class StepLosses:
    """The losses of a batch, or what a part of a batch adds to them: means over the rows of the batch."""

    tasks: dict[str, float]
    """Loss of each task."""
    gate: dict[str, float] = field(default_factory=dict)
    """Auxiliary losses of a joint run, see ``AuxiliaryLosses.losses``."""
    usage: Tensor | None = None
    """[E], the share of the weight that each expert of the gate in training got."""

    def add(self, other: "StepLosses") -> None:
        """Add the losses of another part of the same batch."""
        for sums, values in ((self.tasks, other.tasks), (self.gate, other.gate)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        if other.usage is not None:
            self.usage = other.usage if self.usage is None else self.usage + other.usage


class Gradients:
    """Adds the gradients of batches to the parameters in training.

    On a CPU, ``train.workers`` threads each compute a part of a batch with their share of the cores. On short texts
    this is faster than giving all cores to one matrix product after another, most of which are too small to share.
    Gradients are added in the order of the parts and every part has its own random numbers, so the same seed and number
    of workers give the same weights. Several processes divide the parts in the same way.

    Args:
        model: In training mode when ``add`` is called.
        tasks: Rows by task name.
        parameters: The parameters in training.
        run: The run's config.
        routing: Routes the rows if their tasks do not determine their experts; None routes each row to the expert of
            its task.
    """

    def __init__(
        self,
        model: SparseExpertModel,
        tasks: Mapping[str, TrainingTask],
        *,
        parameters: Sequence[nn.Parameter],
        run: RunConfig,
        routing: JointRouting | FixedRouting | None = None,
    ) -> None:
        self.model, self.tasks, self.parameters, self.run, self.routing = model, tasks, list(parameters), run, routing
        self.teacher_weight = 0.0
        self.workers = min(gather(_count_workers(model, run)))  # equal in all ranks, which divide a batch by it
        self.pool = _thread_pool(self.workers) if self.workers > 1 else None

    def add(self, batch: Rows, *, step: int, teacher_weight: float = 0.0) -> StepLosses:
        """Add the gradients of a batch, and return its losses.

        Args:
            batch: Task and index in ``TrainingTask.groups`` of each row; the rows of a task are adjacent.
            step: Number of the optimizer step, which the random numbers depend on.
            teacher_weight: Weight of the teachers' answers in the losses of tasks that have a teacher, 0 to 1.
        """
        self.teacher_weight = teacher_weight
        parts = list(enumerate(self._divide(batch)))[rank() :: world_size()]
        losses = StepLosses({task: 0.0 for task, _ in batch})
        for start in range(0, len(parts), self.workers):
            for part_losses in self._backward(parts[start : start + self.workers], batch=batch, step=step):
                losses.add(part_losses)
        all_reduce_gradients(self.parameters)
        first, *others = gather(losses)
        for other in others:
            first.add(other)
        return first

    def close(self) -> None:
        """End the threads, and give new threads of this process all cores again."""
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(torch.get_num_threads())

    def _divide(self, batch: Rows) -> list[Rows]:
        """Divide a batch, which is sorted by task, into parts.

        Neighbours are of one task and of similar length, so a part is a slice. In a joint run, where the balance and
        the capacity of experts are those of a part, every part gets rows of each task, and enough rows to show how the
        experts are used.
        """
        count = self.run.train.accumulation * self.workers * world_size()
        if isinstance(self.routing, JointRouting):
            count = max(1, min(count, len(batch) // max(_MIN_ROWS, 2 * len(self.routing.names))))
        if self.run.stage == "joint":
            return [part for start in range(count) if (part := batch[start::count])]
        size = math.ceil(len(batch) / count)
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _backward(self, parts: Sequence[tuple[int, Rows]], *, batch: Rows, step: int) -> list[StepLosses]:
        """Add the gradients of numbered parts, which are computed side by side, and return the losses of each."""
        if self.pool is None and not is_distributed():
            ((_, part),) = parts
            total, losses = self._losses(part, None, batch=batch)
            total.backward()
            return [losses]

        def compute(numbered: tuple[int, Rows]) -> tuple[Sequence[Tensor | None], StepLosses]:
            number, part = numbered
            total, losses = self._losses(part, self._generator(f"step/{step}/{number}"), batch=batch)
            return torch.autograd.grad(total, self.parameters, allow_unused=True), losses

        results = [compute(part) for part in parts] if self.pool is None else list(self.pool.map(compute, parts))
        for gradients, _ in results:
            self._accumulate(gradients)
        return [losses for _, losses in results]

    def _accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:  # laid out as the parameter: fused AdamW pairs numbers by their address
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                parameter.grad.add_(gradient)

    def _generator(self, name: str) -> torch.Generator:
        generator = named_generator(self.run.seed, name)
        if self.model.backbone_dropout:  # draws from the global generator
            torch.manual_seed(generator.initial_seed())
        if self.model.device.type == "cpu":
            return generator
        return torch.Generator(self.model.device).manual_seed(generator.initial_seed())

    def _losses(self, part: Rows, generator: torch.Generator | None, *, batch: Rows) -> tuple[Tensor, StepLosses]:
        """Return what a part of a batch adds to the loss that is minimised, and to the losses that are reported."""
        rows = [(task, index) for task, group in part for index in self.tasks[task].groups[group]]
        transfer, batch_transfer = self._transfer(part), self._transfer(batch)
        examples: list[tuple[str, Example]] = []
        for task in dict.fromkeys([*(task for task, _ in rows), *transfer]):
            examples += [(task, self.tasks[task].examples[index]) for name, index in rows if name == task]
            examples += [(task, text.example) for text in transfer.get(task, ())]
        inputs = collate(examples, pad_id=self.model.backbone.pad_id, device=self.model.device)
        auxiliary = None
        if self.routing is None:
            logits = self.model(inputs, generator=generator, planned=bool(transfer))
        else:
            logits, auxiliary = self.routing.forward(self.model, inputs, rows, generator=generator)
        part_targets, targets = self._count_targets(part), self._count_targets(batch)
        num_rows = Counter(task for task, _ in batch)
        total, losses = torch.zeros((), device=self.model.device), {}
        for task_rows in inputs.tasks:
            task, outputs = task_rows.task, logits[task_rows.task]
            texts = transfer.get(task, [])
            outputs, text_logits = outputs.split([len(outputs) - _num_logit_rows(texts), _num_logit_rows(texts)])
            if texts:
                total = total + self._transfer_loss(
                    task, texts, text_logits, whole=batch_transfer[task], num_rows=len(batch)
                )
            groups = [group for name, group in part if name == task]
            if not groups:
                continue
            assert task_rows.targets is not None
            loss = self._task_loss(self.tasks[task], groups, outputs, task_rows.targets)
            loss = loss * (part_targets[task] / targets[task])
            # Each task weighs as its rows do: a batch is worth the mean over its rows, whatever the task mixture.
            total = total + loss * (num_rows[task] / len(batch))
            losses[task] = loss.item()
        if auxiliary is None:
            return total, StepLosses(losses)
        share = len(part) / len(batch)
        gate = {name: value * share for name, value in auxiliary.losses.items()}
        return total + auxiliary.total * share, StepLosses(losses, gate, auxiliary.usage.cpu() * share)

    def _transfer(self, rows: Rows) -> dict[str, list[TransferExample]]:
        """Return the answers of other tasks' teachers to rows, by task; none if the teachers have no weight."""
        transfer: dict[str, list[TransferExample]] = {}
        for task, group in rows if self.teacher_weight else ():
            examples, index = self.tasks[task].examples, self.tasks[task].groups[group][0]
            row = examples[index].row
            if index and examples[index - 1].row == row:  # another window of the row brings them
                continue
            for other, by_row in self.tasks[task].transfer.items():
                transfer.setdefault(other, []).extend(by_row[row])
        return transfer

    def _transfer_loss(
        self,
        task: str,
        part: Sequence[TransferExample],
        logits: Tensor,
        *,
        whole: Sequence[TransferExample],
        num_rows: int,
    ) -> Tensor:
        """Return what a part of a batch adds to the loss by texts of other tasks, each of which weighs as a row."""
        teacher = torch.cat([text.logits for text in part]).to(logits.device)
        loss = distillation_loss(
            find_kind(self.tasks[task].spec.kind), logits, teacher, temperature=self.run.shared.temperature
        )
        share = _num_logit_rows(part) / _num_logit_rows(whole)
        return self.teacher_weight * loss * share * (len(whole) / num_rows)

    def _count_targets(self, rows: Rows) -> Counter[str]:
        """Count the targets that the mean loss of each task is taken over."""
        counts: Counter[str] = Counter()
        for task, group in rows:
            counts[task] += self.tasks[task].num_targets[group]
        return counts

    def _task_loss(self, task: TrainingTask, groups: Sequence[int], logits: Tensor, targets: Tensor) -> Tensor:
        """Average the loss over rows of one task, from their labels and its teacher's answers in the same order."""
        kind, smoothing = find_kind(task.spec.kind), self.run.train.label_smoothing
        loss = self._mean(task, groups, functools.partial(kind.loss, label_smoothing=smoothing), logits, targets)
        if task.teacher_logits is None or not self.teacher_weight:
            return loss
        soft = [task.teacher_logits[index] for group in groups for index in task.groups[group]]
        teacher = (torch.cat(soft) if soft[0].dim() > 1 else torch.stack(soft)).to(logits.device)
        diverging = functools.partial(distillation_loss, kind, temperature=self.run.shared.temperature)
        distillation = self._mean(task, groups, diverging, logits, teacher)
        return (1 - self.teacher_weight) * loss + self.teacher_weight * distillation

    def _mean(
        self,
        task: TrainingTask,
        groups: Sequence[int],
        loss: Callable[[Tensor, Tensor], Tensor],
        logits: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Average a loss over rows, each by itself if the kind of the task goes by row."""
        if not find_kind(task.spec.kind).grouped:
            return loss(logits, targets)
        sizes = [sum(len(task.examples[index].targets) for index in task.groups[group]) for group in groups]
        parts = zip(logits.split(sizes), targets.split(sizes), strict=True)
        return torch.stack([loss(*part) for part in parts]).mean()


def _num_logit_rows(transfer: Sequence[TransferExample]) -> int:
    """Count the rows of logits: one a word, or one a text."""
    return sum(len(text.logits) for text in transfer)


def _count_workers(model: SparseExpertModel, run: RunConfig) -> int:
    if model.device.type != "cpu" or model.backbone_dropout:  # the backbone's dropout draws from one generator
        return 1
    return min(run.train.workers or torch.get_num_threads(), run.train.batch_size)


def _thread_pool(workers: int) -> ThreadPoolExecutor:
    """Start threads that share the cores which torch would give to each operation."""
    share = max(1, torch.get_num_threads() // workers)
    return ThreadPoolExecutor(workers, "train", initializer=torch.set_num_threads, initargs=(share,))
