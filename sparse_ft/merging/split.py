"""Split an expert in two: each of the halves serves a part of its task's texts, and the gate tells them apart."""

from dataclasses import replace

import numpy as np
import torch
from sklearn.cluster import KMeans

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.training.fit_gate import fit_gate, gate_block
from sparse_ft.training.gate_stage import note_accuracy, rows_by_expert
from sparse_ft.training.training_task import prepare_task


def split_expert(checkpoint: Checkpoint, name: str, new: str) -> list[str]:
    """Split an expert by the texts of its task, which are read from where they were in training.

    k-means finds two groups in what the gate reads of the texts. The new expert is a copy, so no answer changes until
    ``sparse-ft train --from`` trains the two further, each on the texts that the gate sends to it.

    Args:
        checkpoint: Changed in place.
        name: An expert that serves one task.
        new: Name of the second half.

    Returns:
        What was done, in sentences.

    Raises:
        ConfigError: If the expert serves no task or several, or its task is mixed by a gate already.
        DataError: If the rows of a task are not there.
    """
    model, config = checkpoint.model, checkpoint.config
    expert = model.experts.get(name)
    served = [task for task, slot in model.tasks.items() if name in slot.experts]
    mixed = [task for task, slot in model.tasks.items() if slot.joint]
    if len(served) != 1 or mixed:
        problem = f"serves {len(served)} tasks" if len(served) != 1 else "is mixed with others by a gate"
        raise ConfigError(f"Expert {name!r} {problem}; one that serves a single task alone can be split.")
    (task,) = served
    for other, slot in model.tasks.items():
        first, *rest = (model.experts.get(used) for used in slot.experts)
        if other != task and not all(_alike(first, one) for one in rest):
            raise ConfigError(
                f"Task {other!r} is split between {' and '.join(slot.experts)}, which differ by now, and the gate of a "
                "new split would answer it otherwise. Split all tasks first, in one command, then train them."
            )
    encoder = Encoder(model.backbone, max_length=config.data.max_length)
    ready = {
        other: prepare_task(spec, run=config, encoder=encoder, before=spec) for other, spec in checkpoint.tasks.items()
    }
    rows = rows_by_expert(model, ready)
    halves = _halves(model, rows[name], block=gate_block(model, config.gate), seed=config.seed)
    model.experts.add(replace(expert, name=new))
    slot = model.tasks[task]
    model.tasks[task] = replace(slot, experts=(*slot.experts, new))
    rows |= {name: halves[0], new: halves[1]}
    model.gate = fit_gate(model, rows, names=model.routed, settings=config.gate, seed=config.seed)
    model.eval().requires_grad_(False)
    note_accuracy(model, ready, metrics=checkpoint.metrics)
    return [
        f"Split expert {name!r} of task {task!r} into {name!r} ({len(halves[0])} training rows) and {new!r} "
        f"({len(halves[1])}). They are still the same; `sparse-ft train --from … --task {task}` trains them apart."
    ]


def _alike(one: Expert, other: Expert) -> bool:
    """Whether two experts change a text alike, so that it does not matter which of them it goes to."""
    if one.deltas.keys() != other.deltas.keys() or one.alpha != other.alpha:
        return False
    shapes = [torch.zeros(0) if expert.word_shapes is None else expert.word_shapes for expert in (one, other)]
    pairs = [
        (own, theirs) for key in one.deltas for own, theirs in zip(one.deltas[key], other.deltas[key], strict=True)
    ]
    return all(torch.equal(own, theirs) for own, theirs in [*pairs, tuple(shapes)])


def _halves(
    model: SparseExpertModel, examples: list[Example], *, block: int, seed: int
) -> tuple[list[Example], list[Example]]:
    read = mean_states(model, examples, block=block)[:, -1]
    features = (read - read.mean(0)) / read.std(0, correction=0).clamp_min(1e-6)
    groups = KMeans(2, n_init=4, random_state=seed).fit_predict(features.double().numpy())
    first, second = ([examples[place] for place in np.flatnonzero(groups == half)] for half in (0, 1))
    if min(len(first), len(second)) < 2:
        raise ConfigError(f"The {len(examples)} training rows do not fall into two groups of two rows or more.")
    return first, second
