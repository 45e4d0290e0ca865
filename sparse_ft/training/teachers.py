"""Teachers: checkpoints whose experts answer the training rows, so that a student learns from their logits, too.

Distillation: Hinton et al. 2015, https://arxiv.org/abs/1503.02531. The weight of the teachers falls to 0 in training
(teacher annealing) as in BAM: Clark et al. 2019, https://arxiv.org/abs/1907.04829.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.words import join_words
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest
from sparse_ft.config import RunConfig
from sparse_ft.errors import ConfigError
from sparse_ft.experts.inference import row_logits
from sparse_ft.experts.named_experts import Expert
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.kind import TaskKind
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.training_task import TrainingTask, TransferExample


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that teaches one of its tasks."""

    checkpoint: Checkpoint
    encoder: Encoder
    spec: TaskSpec

    @property
    def expert(self) -> Expert | None:
        """The expert that answers the task alone; None if the answer comes from several."""
        model = self.checkpoint.model
        slot = model.tasks[self.spec.name]
        return None if slot.gated or slot.shared is not None else model.experts.get(slot.experts[0])

    def logits(self, columns: Mapping[str, Sequence[Any]], *, title: str | None = None) -> list[Tensor]:
        """Answer rows: (labels,), (words, tags) or (choices, 1) float32 a row.

        Args:
            columns: The rows as ``reading.read`` returns them.
            title: Of a progress bar; None shows none.
        """
        kind, model, name = find_kind(self.spec.kind), self.checkpoint.model, self.spec.name
        examples = kind.encode(
            columns, encoder=self.encoder, labels=self.spec.label_names or [], language=self.spec.language
        )
        route = Route("task", model)
        gate = route.block_gate(name)
        return row_logits(
            model,
            name,
            examples,
            num_rows=len(next(iter(columns.values()))),
            num_parts=kind.num_parts(columns, language=self.spec.language),
            routing=None if gate else route.rows(examples, task=name),
            gate=gate,
            title=title,
        )


def find_teachers(paths: Sequence[str | Path], tasks: Sequence[str] = ()) -> dict[str, Path]:
    """Return the checkpoint that teaches each task, in the order of the checkpoints.

    Args:
        paths: Folders of checkpoints.
        tasks: The tasks that are taught; none takes all of the checkpoints.

    Raises:
        ConfigError: If two checkpoints have the same task.
    """
    owners: dict[str, Path] = {}
    for path in map(Path, paths):
        for name in read_manifest(path).tasks:
            if name in owners and (not tasks or name in tasks):
                raise ConfigError(
                    f"Task {name!r} is in two of the checkpoints, {str(owners[name])!r} and {str(path)!r}. Remove it "
                    f"from one, or rename it: sparse-ft edit {path} --rename-task {name}=NEW."
                )
            owners.setdefault(name, path)
    return {name: path for name, path in owners.items() if not tasks or name in tasks}


def load_teachers(
    run: RunConfig, tasks: Sequence[str], *, device: torch.device, trust_tasks: bool
) -> dict[str, Teacher]:
    """Load the checkpoints that teach, and return the teacher of each task that has one.

    Args:
        run: The run's config.
        tasks: Names of the tasks in training.
        device: Where the teachers answer.
        trust_tasks: Whether their tasks may name code and data on the hub.

    Raises:
        ConfigError: If two checkpoints teach the same task.
    """
    owners = find_teachers(run.shared.teachers, tasks)
    loaded = {path: load_checkpoint(path, device=device) for path in dict.fromkeys(owners.values())}
    teachers = {}
    for name, path in owners.items():
        checkpoint = loaded[path]
        spec = checkpoint.tasks[name].marked(foreign=not trust_tasks)
        teachers[name] = Teacher(checkpoint, checkpoint.encoder, spec)
    return teachers


def with_teacher_logits(
    tasks: Mapping[str, TrainingTask],
    teachers: Mapping[str, Teacher],
    *,
    transfer: Literal["none", "words", "all"],
    encoder: Encoder,
) -> dict[str, TrainingTask]:
    """Return tasks with their teachers' logits for their rows, and for the rows of other tasks.

    Args:
        tasks: The tasks in training.
        teachers: Of the tasks that have one.
        transfer: Which teachers answer the rows of other tasks, too: none, those of tasks on words, or all.
        encoder: The encoder of the student.
    """
    result = dict(tasks)
    for name, teacher in teachers.items():
        logits = teacher.logits(tasks[name].columns, title=f"teacher of {name}")
        soft = [logits[e.row][e.word_indices] if e.word_indices else logits[e.row] for e in tasks[name].examples]
        result[name] = replace(result[name], teacher_logits=soft)
        if transfer == "all" or (transfer == "words" and find_kind(teacher.spec.kind).level == "word"):
            for other in tasks:
                if other != name and tasks[name].spec.reads == tasks[other].spec.reads == "text":
                    heard = _transfer(tasks[name].spec, teacher, tasks[other], encoder=encoder)
                    result[other] = replace(result[other], transfer={**result[other].transfer, name: heard})
    return result


def _transfer(
    spec: TaskSpec, teacher: Teacher, other: TrainingTask, *, encoder: Encoder
) -> list[list[TransferExample]]:
    """Return what a teacher says of each row of another task, read as its own task reads it."""
    kind = find_kind(spec.kind)
    columns = {"text": other.columns.get("text") or [join_words(words) for words in other.columns["tokens"]]}
    logits = teacher.logits(columns, title=f"teacher of {spec.name} on {other.spec.name}")
    transfer: list[list[TransferExample]] = [[] for _ in columns["text"]]
    examples = kind.encode(columns, encoder=encoder, labels=spec.label_names or [], language=spec.language)
    for each in examples:
        said = logits[each.row][each.word_indices] if kind.level == "word" else logits[each.row].unsqueeze(0)
        if len(said):
            transfer[each.row].append(TransferExample(each, said))
    return transfer


def distillation_loss(kind: TaskKind, logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T² KL(teacher || student) of the softened outputs, averaged over rows or words.

    Where each output has a sigmoid, it is averaged over all outputs.

    Args:
        kind: Of the task.
        logits: [rows or words, outputs], or [choices, 1] of one row if the kind is ``grouped``.
        teacher: Of the same shape.
        temperature: T, which divides both.

    Returns:
        Scalar float32.
    """
    student, teacher = logits / temperature, teacher / temperature
    if not kind.exclusive:  # a sigmoid an output
        entropy = functional.binary_cross_entropy_with_logits(teacher, teacher.sigmoid())
        loss = functional.binary_cross_entropy_with_logits(student, teacher.sigmoid()) - entropy
        return loss * temperature**2
    dim = -2 if kind.grouped else -1
    student, teacher = student.log_softmax(dim), teacher.log_softmax(dim)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True)
    return divergence.sum(dim).mean() * temperature**2
