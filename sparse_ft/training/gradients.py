"""The gradients of one batch: computed in parts, after one another to save memory, or side by side to save time."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparse_ft.backbone.batching import collate
from sparse_ft.config import RunConfig
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import named_generator
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.kind import IGNORED
from sparse_ft.training.joint import Domains, Mixing, Pairs
from sparse_ft.training.processes import all_reduce_gradients, gather, is_distributed, rank, world_size
from sparse_ft.training.training_task import TrainingTask

_ROWS = 8
"""Least rows of a part in a joint run, if the experts are few."""


@dataclass(frozen=True)
class _Whole:
    """The batch that parts are taken of."""

    rows: int
    targets: dict[str, int]
    """Task to what its mean loss is taken over."""
    task_rows: dict[str, int]


@dataclass
class Found:
    """What a batch told: means over its rows."""

    losses: dict[str, float]
    """Of each task."""
    auxiliary: dict[str, float] = field(default_factory=dict)
    """Of the gate, in a joint run; see ``Auxiliary.losses``."""
    usage: Tensor | None = None
    """[E], the share of the weight that each expert of the gate got."""

    def add(self, other: "Found") -> None:
        """Add what another part of the batch told."""
        for own, theirs in ((self.losses, other.losses), (self.auxiliary, other.auxiliary)):
            for name, value in theirs.items():
                own[name] = own.get(name, 0.0) + value
        if other.usage is not None:
            self.usage = other.usage if self.usage is None else self.usage + other.usage


class Gradients:
    """Adds the gradients of batches to the parameters in training.

    On a CPU, ``train.workers`` threads each compute a part of a batch with their share of the cores. On short texts
    that beats giving all cores to one matrix product after the other, most of which are too small to share. Gradients
    are added in the order of the parts and every part has random numbers of its own, so the same seed and number of
    workers give the same weights. Several processes share the parts in the same way.

    Args:
        model: In training mode when ``add`` is called.
        tasks: Rows by task name.
        parameters: What learns.
        run: The run's config.
        accelerator: Scales the loss where the precision asks for it.
        mixing: Routes the rows where the task does not say all; in a joint run it adds the gate's losses.
    """

    def __init__(
        self,
        model: SparseExpertModel,
        tasks: Mapping[str, TrainingTask],
        *,
        parameters: Sequence[nn.Parameter],
        run: RunConfig,
        accelerator: Accelerator,
        mixing: Mixing | Domains | None = None,
    ) -> None:
        self.mixing = mixing
        self.model, self.tasks, self.parameters, self.run = model, tasks, list(parameters), run
        self.accelerator = accelerator
        self.workers = min(gather(_count_workers(model, run)))  # the same in all, for they divide a batch by it
        self.pool = _thread_pool(self.workers) if self.workers > 1 else None

    def add(self, pairs: Pairs, *, step: int) -> Found:
        """Add the gradients of a batch.

        Args:
            pairs: Its rows, by task and place among ``TrainingTask.units``.
            step: Number of the optimizer step, which the random numbers depend on.
        """
        targets = _count_targets(self.tasks, pairs)
        whole = _Whole(len(pairs), targets, {name: sum(task == name for task, _ in pairs) for name in targets})
        told = Found(dict.fromkeys(targets, 0.0))
        parts = self._parts(pairs, self.run.train.accumulation * self.workers * world_size())
        own = list(enumerate(parts))[rank() :: world_size()]
        for start in range(0, len(own), self.workers):
            for found in self._backward(own[start : start + self.workers], step, whole=whole):
                told.add(found)
        all_reduce_gradients(self.parameters)
        first, *others = gather(told)
        for other in others:
            first.add(other)
        return first

    def _parts(self, pairs: Pairs, count: int) -> list[Pairs]:
        """Divide a batch, which is in the order of the tasks.

        Neighbours are of one task and thus of like length, so they stay together. Not in a joint run: its balance and
        its capacity are those of a part, which should hold of every task what the batch does, and rows enough to say
        how the experts are used.
        """
        if isinstance(self.mixing, Mixing):
            count = max(1, min(count, len(pairs) // max(_ROWS, 2 * len(self.mixing.names))))
        if self.run.stage == "joint":
            return [part for start in range(count) if (part := pairs[start::count])]
        size = math.ceil(len(pairs) / count)
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def close(self) -> None:
        """Let the threads end; theirs was the number of cores that new threads of the process would take."""
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(torch.get_num_threads())

    def _backward(self, parts: Sequence[tuple[int, Pairs]], step: int, *, whole: "_Whole") -> list[Found]:
        """Compute some numbered parts side by side; return what each adds to the means over the batch."""
        if self.pool is None and not is_distributed():
            ((_, part),) = parts
            total, told = self._losses(part, None, whole=whole)
            self.accelerator.backward(total)
            return [told]

        def work(numbered: tuple[int, Pairs]) -> tuple[Sequence[Tensor | None], Found]:
            generator = self._generator(f"step/{step}/{numbered[0]}")
            total, told = self._losses(numbered[1], generator, whole=whole)
            return torch.autograd.grad(total, self.parameters, allow_unused=True), told

        found = [work(part) for part in parts] if self.pool is None else list(self.pool.map(work, parts))
        for gradients, _ in found:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:  # laid out as the parameter: fused AdamW pairs numbers by their address
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
                else:
                    parameter.grad.add_(gradient)
        return [told for _, told in found]

    def _generator(self, name: str) -> torch.Generator:
        generator = named_generator(self.run.seed, name)
        if self.model.backbone_dropout:  # which draws from the global one
            torch.manual_seed(generator.initial_seed())
        if self.model.device.type == "cpu":
            return generator
        return torch.Generator(self.model.device).manual_seed(generator.initial_seed())

    def _losses(
        self,
        pairs: Pairs,
        generator: torch.Generator | None,
        *,
        whole: "_Whole",
    ) -> tuple[Tensor, Found]:
        """Return what some rows of a batch add to the loss that is trained on, and to the means over the batch."""
        places = [(task, place) for task, unit in pairs for place in self.tasks[task].units[unit]]
        rows = [(task, self.tasks[task].examples[place]) for task, place in places]
        batch = collate(rows, pad_id=self.model.backbone.pad_id, device=self.model.device)
        mixing = self.mixing
        logits, added = (
            (self.model(batch, generator=generator), None)
            if mixing is None
            else mixing.run(self.model, batch, places, generator=generator)
        )
        share = _count_targets(self.tasks, pairs)
        total, losses = torch.zeros((), device=self.model.device), {}
        for part in batch.tasks:
            assert part.targets is not None
            own = [unit for task, unit in pairs if task == part.task]
            mean = self._mean_loss(self.tasks[part.task], own, logits[part.task], part.targets)
            loss = mean * (share[part.task] / whole.targets[part.task])
            # Each task weighs as its rows do: a batch is worth the mean over its rows, whatever the mixture.
            total = total + loss * (whole.task_rows[part.task] / whole.rows)
            losses[part.task] = loss.item()
        if added is None:
            return total, Found(losses)
        part_of_batch = len(pairs) / whole.rows
        scaled = {name: value * part_of_batch for name, value in added.losses.items()}
        return total + added.total * part_of_batch, Found(losses, scaled, added.usage.cpu() * part_of_batch)

    def _mean_loss(self, task: TrainingTask, units: Sequence[int], logits: Tensor, targets: Tensor) -> Tensor:
        """Average the loss of some rows of one task, whose logits and targets follow one another."""
        kind, smoothing = find_kind(task.spec.kind), self.run.train.label_smoothing
        if not kind.by_row:
            return kind.loss(logits, targets, label_smoothing=smoothing)
        sizes = [sum(len(task.examples[place].targets) for place in task.units[unit]) for unit in units]
        parts = zip(logits.split(sizes), targets.split(sizes), strict=True)
        return torch.stack([kind.loss(*part, label_smoothing=smoothing) for part in parts]).mean()


def _count_workers(model: SparseExpertModel, run: RunConfig) -> int:
    if model.device.type != "cpu" or model.backbone_dropout:  # the backbone's own dropout draws from one generator
        return 1
    return min(run.train.workers or torch.get_num_threads(), run.train.batch_size)


def _thread_pool(workers: int) -> ThreadPoolExecutor:
    """Start threads that share the cores which torch would give to each operation."""
    share = max(1, torch.get_num_threads() // workers)
    return ThreadPoolExecutor(workers, "train", initializer=torch.set_num_threads, initargs=(share,))


def _count_targets(tasks: Mapping[str, TrainingTask], pairs: Pairs) -> dict[str, int]:
    """Count what the mean loss of each task is taken over."""
    counts: dict[str, int] = {}
    for task, unit in pairs:
        if find_kind(tasks[task].spec.kind).by_row:
            number = 1
        else:
            (place,) = tasks[task].units[unit]
            number = sum(target != IGNORED for target in tasks[task].examples[place].targets)
        counts[task] = counts.get(task, 0) + number
    return counts
