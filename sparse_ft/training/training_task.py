"""The rows that a task is trained on, read, encoded and checked."""

import logging
from dataclasses import dataclass
from functools import cached_property

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.config import RunConfig
from sparse_ft.errors import DataError, unknown_name
from sparse_ft.evaluation.scoring import score_rows
from sparse_ft.tasks.encoded_rows import EvalData, prepare, whole_rows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.kind import IGNORED
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import TaskSpec

_LOG = logging.getLogger("sparse_ft")


@dataclass(frozen=True)
class TrainingTask:
    """One task, ready to train on."""

    spec: TaskSpec
    """With all labels filled in."""
    examples: list[Example]
    """Each with at least one target."""
    whole: list[Example]
    """One a row, as a gate for texts is shown it."""
    validation: EvalData

    @cached_property
    def units(self) -> list[list[int]]:
        """Places of the examples that are learnt together: those of a row if the kind goes by row, else each alone."""
        if not find_kind(self.spec.kind).by_row:
            return [[place] for place in range(len(self.examples))]
        units: dict[int, list[int]] = {}
        for place, example in enumerate(self.examples):
            units.setdefault(example.row, []).append(place)
        return list(units.values())


def prepare_task(spec: TaskSpec, *, run: RunConfig, encoder: Encoder, before: TaskSpec | None = None) -> TrainingTask:
    """Read and encode the training and validation rows of a task.

    Args:
        spec: The task.
        run: Where its data is, and how much of it to use.
        encoder: Of the backbone.
        before: The task as a checkpoint has it; its head must know every label.

    Raises:
        DataError: If there are no rows, or a label is new to the head.
    """
    found = read(spec, data=run.sources.get(spec.name), splits=["train", "validation"])
    if "train" not in found or len(found["train"]) == 0:
        raise DataError(f"Task {spec.name!r} has no training rows. Name a folder or file that has some with --data.")
    labels = label_names(spec, found["train"])
    if before is not None:
        if spec.kind != before.kind:
            raise DataError(
                f"Task {spec.name!r} is a {spec.kind}, but in {run.start!r} it is a {before.kind}. Rename the task to "
                "train a new expert for it."
            )
        extra = sorted(set(labels) - set(before.label_names or []))
        if extra:
            raise DataError(
                f"Task {spec.name!r} in {run.start!r} has no label {extra[0]!r}. Its head was trained on: "
                f"{', '.join(before.label_names or [])}. Rename the task to train a new expert for other labels."
            )
        labels = before.label_names or labels
    spec = spec.with_labels(labels)
    if spec.out_of_scope is not None and spec.out_of_scope not in labels:
        raise DataError(f"out_of_scope of task {spec.name!r}: {unknown_name('label', spec.out_of_scope, labels)}")
    rows = found["train"]
    if run.data.train_limit is not None and len(rows) > run.data.train_limit:
        rows = rows.shuffle(seed=run.seed).select(range(run.data.train_limit))
    kind = find_kind(spec.kind)
    if encoder.last_piece and kind.level == "word":
        _LOG.warning(
            "Backbone %s is causal: a word sees only what stands left of it. Task %s will tag better on a BERT.",
            run.backbone,
            spec.name,
        )
    columns = rows.to_dict()
    examples = kind.encode(columns, encoder=encoder, labels=labels, language=spec.language)
    whole = whole_rows(examples, columns, spec=spec, encoder=encoder)
    examples = [example for example in examples if any(target != IGNORED for target in example.targets)]
    validation = prepare(found["validation"].to_dict(), spec=spec, encoder=encoder)
    if not examples or validation.num_rows == 0:
        raise DataError(
            f"Task {spec.name!r} has {len(examples)} training and {validation.num_rows} validation rows with answers."
        )
    score_rows(
        spec, validation, kind.references(validation.columns)
    )  # an impossible metric shows here, not after an epoch
    return TrainingTask(spec, examples, whole, validation)
