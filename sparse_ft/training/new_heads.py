"""The start of a new head: the mean of each class, in the states of the backbone before training."""

import re

import torch
from torch.nn import functional

from sparse_ft.backbone.batching import collate, length_batches, token_limit
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.pooling import pool
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.training_task import TrainingTask

_MAX_ROWS = 50
"""Most rows of a class; more rows hardly change its mean."""

_SCALE = 20.0
"""Logits are cosines times this, as in the training of sentence-transformers:
https://github.com/UKPLab/sentence-transformers/blob/v3.0.0/sentence_transformers/losses/MultipleNegativesRankingLoss.py.
"""

_SEPARATORS = re.compile(r"(?<=[^\W_])[-_]+(?=[^\W_])")


def has_start(model: SparseExpertModel, spec: TaskSpec) -> bool:
    """Return whether a head can start at class means: only single texts, as vectors of one length, are near theirs."""
    return spec.kind == "classification" and spec.reads == "text" and model.pooling == "unit"


@torch.no_grad()
def start_head(model: SparseExpertModel, task: TrainingTask, *, encoder: Encoder) -> None:
    """Set a head to the nearest class mean, by the direction from the centre of all class means.

    Logits are 20 times the cosine if texts point in all directions, and smaller if the backbone keeps them close
    together, so that classes which it cannot separate start near chance. Training also ends better with few rows a
    class; benchmarks/results.md has the figures ("Ten rows a class"). The name of a class counts as one more text. The
    centre weighs all classes equally, whatever their size.

    Args:
        model: On its device, in evaluation mode, with the task's head.
        task: A task for which ``has_start`` is true.
        encoder: Encoder of the backbone.
    """
    labels = task.spec.label_names or []
    texts = list(enumerate(encoder.texts([_SEPARATORS.sub(" ", label) for label in labels])))
    counts = [1] * len(labels)
    for example in task.examples:
        (label,) = example.targets
        if counts[label] <= _MAX_ROWS:
            counts[label] += 1
            texts.append((label, example))
    means = torch.zeros(len(labels), model.backbone.hidden_size, device=model.device)
    for members in length_batches([len(text.input_ids) for _, text in texts], max_tokens=token_limit(model.device)):
        rows = [("", texts[member][1]) for member in members]
        batch = collate(rows, pad_id=model.backbone.pad_id, device=model.device)
        share = torch.zeros(len(labels), len(rows), device=model.device)  # weight of each text in the mean of its class
        for index, member in enumerate(members):
            label = texts[member][0]
            share[label, index] = 1 / counts[label]
        means += share @ pool(model.states_by(model.trunk_expert, batch), batch.attention_mask, model.pooling)
    centre = means.mean(0)
    linear = model.head(task.spec.name).linear
    linear.weight.copy_(functional.normalize(means - centre, dim=-1) * (_SCALE / len(centre) ** 0.5))
    linear.bias.copy_(-(linear.weight @ centre))
