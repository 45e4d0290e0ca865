"""Split an expert in two: each half serves a part of its task's texts, and the gate tells the parts apart."""

from dataclasses import replace

import numpy as np
import torch
from sklearn.cluster import KMeans

from sparse_ft.backbone.encoding import Example
from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.bookkeeping import check_new_names
from sparse_ft.training.fit_gate import fit_gate, gate_block
from sparse_ft.training.gate_stage import note_accuracy, rows_by_expert
from sparse_ft.training.training_task import prepare_task


def split_expert(checkpoint: Checkpoint, name: str, new: str) -> list[str]:
    """Split an expert by the training texts of its task, and return sentences about what was done.

    k-means finds two groups among the hidden states that the gate reads. The new expert is a copy, so no answer changes
    until ``sparse-ft train --from`` trains the two further, each on the texts that the gate sends to it.

    Args:
        checkpoint: Changed in place.
        name: An expert that serves one task.
        new: Name of the second half.

    Raises:
        ConfigError: If a name is unknown or taken, the expert serves no task or several, its task already has a gate,
            or another task was split and trained before.
        DataError: If the rows of a task are missing.
    """
    check_new_names(checkpoint, experts=[new])
    model, config = checkpoint.model, checkpoint.config
    task = _check_splittable(model, name)
    encoder = checkpoint.encoder
    ready = {
        other: prepare_task(spec, run=config, encoder=encoder, before=spec) for other, spec in checkpoint.tasks.items()
    }
    rows = rows_by_expert(model, ready)
    halves = _halves(model, rows[name], block=gate_block(model, config.gate), seed=config.seed)
    model.experts.add(replace(model.experts.get(name), name=new))
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


def _check_splittable(model: SparseExpertModel, name: str) -> str:
    """Return the only task of an expert, or raise why the expert cannot be split."""
    model.experts.get(name)
    served = [task for task, slot in model.tasks.items() if name in slot.experts]
    joint = any(slot.joint for slot in model.tasks.values())
    if len(served) != 1 or joint:
        problem = f"serves {len(served)} tasks" if len(served) != 1 else "is mixed with others by a gate"
        raise ConfigError(f"Expert {name!r} {problem}; one that serves a single task alone can be split.")
    for task, slot in model.tasks.items():
        first, *rest = (model.experts.get(used) for used in slot.experts)
        if task != served[0] and not all(_alike(first, other) for other in rest):
            raise ConfigError(
                f"Task {task!r} is split between {' and '.join(slot.experts)}, which differ by now, so the gate of a "
                "new split would change its answers. Split all tasks first, in one command, then train them."
            )
    return served[0]


def _alike(one: Expert, other: Expert) -> bool:
    """Whether two experts change hidden states in the same way, so that a text may go to either."""
    if one.deltas.keys() != other.deltas.keys() or one.alpha != other.alpha:
        return False
    pairs = [pair for key in one.deltas for pair in zip(one.deltas[key], other.deltas[key], strict=True)]
    first, second = (torch.zeros(0) if each.word_shapes is None else each.word_shapes for each in (one, other))
    return all(torch.equal(left, right) for left, right in [*pairs, (first, second)])


def _halves(
    model: SparseExpertModel, examples: list[Example], *, block: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Divide examples into two groups by the states that the gate reads."""
    states = mean_states(model, examples, block=block, expert=model.trunk_expert)[:, -1]  # [N, hidden]
    features = (states - states.mean(0)) / states.std(0, correction=0).clamp_min(1e-6)
    groups = KMeans(2, n_init=4, random_state=seed % 2**32).fit_predict(features.double().numpy())
    first, second = ([examples[index] for index in np.flatnonzero(groups == half)] for half in (0, 1))
    if min(len(first), len(second)) < 2:
        raise ConfigError(f"The {len(examples)} training rows do not fall into two groups of two rows or more.")
    return first, second
