"""The rows that a task is trained on, read, encoded and checked."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from sparse_ft.backbone.coverage import misfit
from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.config import RunConfig
from sparse_ft.errors import DataError, unknown_name
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows, examples_by_row
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.kind import IGNORED
from sparse_ft.tasks.reading import label_names, read_divided
from sparse_ft.tasks.spec import TaskSpec

_LOG = logging.getLogger("sparse_ft")


class TransferExample(NamedTuple):
    """A text as another task reads it, without targets, and the logits of that task's teacher."""

    example: Example
    logits: Tensor
    """(1, outputs) or (words, outputs)."""


@dataclass(frozen=True)
class TrainingTask:
    """The encoded rows of a task in training."""

    spec: TaskSpec
    """The task with its labels."""
    examples: list[Example]
    """Training examples, one or several a row; each has at least one target."""
    row_examples: list[Example]
    """One example a training row, as a gate for texts reads it."""
    validation: EncodedRows
    columns: dict[str, list[Any]]
    """The training rows as ``reading.read`` returns them; an example's ``row`` indexes them."""
    teacher_logits: list[Tensor] | None = None
    """Logits of the task's teacher for each example, (outputs,), or (words or choices, outputs)."""
    transfer: dict[str, list[list[TransferExample]]] = field(default_factory=dict)
    """Other task to its teacher's answers to each training row of this task."""

    @cached_property
    def groups(self) -> list[list[int]]:
        """Indices of examples that are learned together: those of a row if the kind goes by row, else each alone."""
        if not find_kind(self.spec.kind).grouped:
            return [[index] for index in range(len(self.examples))]
        groups: dict[int, list[int]] = {}
        for index, example in enumerate(self.examples):
            groups.setdefault(example.row, []).append(index)
        return list(groups.values())

    @cached_property
    def num_tokens(self) -> list[int]:
        """Number of tokens of each group."""
        return [sum(len(self.examples[index].input_ids) for index in group) for group in self.groups]

    @cached_property
    def num_targets(self) -> list[int]:
        """Number of targets of each group that a mean loss counts: 1 if the kind goes by row."""
        if find_kind(self.spec.kind).grouped:
            return [1] * len(self.groups)
        return [sum(target != IGNORED for target in example.targets) for example in self.examples]


def prepare_task(
    spec: TaskSpec,
    *,
    run: RunConfig,
    encoder: Encoder,
    before: TaskSpec | None = None,
    sources: Mapping[str, TaskData] | None = None,
) -> TrainingTask:
    """Read and encode the training and validation rows of a task.

    Args:
        spec: The task.
        run: The run's config.
        encoder: Encoder of the backbone.
        before: The task in the checkpoint that the run starts from; its head must know every label.
        sources: Data by task; None takes the sources that the run's config names.

    Raises:
        DataError: If there are no rows, or a label is unknown to the head.
    """
    data = (run.sources if sources is None else sources).get(spec.name)
    known = None if before is None else before.division
    splits, division = read_divided(spec, data=data, splits=["train", "validation"], before=known)
    if "train" not in splits or len(splits["train"]) == 0:
        raise DataError(f"Task {spec.name!r} has no training rows. Name a folder or file that has some with --data.")
    spec = spec.model_copy(update={"division": division})
    spec = spec.with_labels(
        _labels(
            spec, label_names(spec, splits["train"]), before=before, start=run.start or ", ".join(run.shared.teachers)
        )
    )
    labels, kind = spec.label_names or [], find_kind(spec.kind)
    if spec.out_of_scope is not None and spec.out_of_scope not in labels:
        raise DataError(f"out_of_scope of task {spec.name!r}: {unknown_name('label', spec.out_of_scope, labels)}")
    if encoder.last_piece and kind.level == "word":
        _LOG.warning(
            "Backbone %s is causal: a word sees only the words to its left. Task %s will tag better on a BERT.",
            run.backbone,
            spec.name,
        )
    rows = splits["train"]
    if run.data.train_limit is not None and len(rows) > run.data.train_limit:
        rows = rows.shuffle(seed=run.seed).select(range(run.data.train_limit))
    columns = rows.to_dict()
    texts = columns["text"] if "text" in columns else [" ".join(tokens) for tokens in columns["tokens"]]
    if reason := misfit(encoder.tokenizer, texts):
        _LOG.warning(
            "The tokenizer of backbone %s was not made for the texts of task %s (%s): %s. Expect low scores; choose a "
            "backbone of this language or a multilingual one.", run.backbone, spec.name, spec.language, reason,
        )  # fmt: skip
    examples = kind.encode(columns, encoder=encoder, labels=labels, language=spec.language)
    row_examples = examples_by_row(examples, columns, spec=spec, encoder=encoder)
    examples = [example for example in examples if any(target != IGNORED for target in example.targets)]
    held_out = splits.get("validation", rows)  # where every row is trained on, these choose the state that is kept
    validation = encode_rows(held_out.to_dict(), spec=spec, encoder=encoder)
    if not examples or validation.num_rows == 0:
        raise DataError(
            f"Task {spec.name!r} has {len(examples)} training and {validation.num_rows} validation rows with answers. "
            "Expected at least one of each. Label every row, or leave rows without a label out of the data."
        )
    return TrainingTask(spec, examples, row_examples, validation, columns)


def _labels(spec: TaskSpec, labels: list[str], *, before: TaskSpec | None, start: str | None) -> list[str]:
    """Return the labels of the training rows, in the order of the head that was trained before, if there is one."""
    if before is None:
        return labels
    if spec.kind != before.kind:
        raise DataError(
            f"Task {spec.name!r} is a {spec.kind}, but in {start!r} it is a {before.kind}. Rename the task to train a "
            "new expert for it."
        )
    extra = sorted(set(labels) - set(before.label_names or []))
    if extra:
        raise DataError(
            f"Task {spec.name!r} in {start!r} has no label {extra[0]!r}. Its head was trained on: "
            f"{', '.join(before.label_names or [])}. Rename the task to train a new expert for other labels."
        )
    return before.label_names or labels
