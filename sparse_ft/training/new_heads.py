"""Where the head of a new task begins: at its classes, as the backbone sees them before anything is learnt."""

import re

import torch
from torch.nn import functional

from sparse_ft.backbone.batching import collate, length_batches, token_limit
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.pooling import pool
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.training_task import TrainingTask

_ROWS = 50
"""Of each class; more say little more about a mean."""

_SCALE = 20.0
"""So many times a cosine is a logit, as where sentence-transformers trains:
https://github.com/UKPLab/sentence-transformers/blob/v3.0.0/sentence_transformers/losses/MultipleNegativesRankingLoss.py.
"""

_BETWEEN = re.compile(r"(?<=[^\W_])[-_]+(?=[^\W_])")


def has_start(model: SparseExpertModel, spec: TaskSpec) -> bool:
    """Say whether class means tell anything: single texts of one length have directions that do, pairs have not."""
    return spec.kind == "classification" and spec.reads == "text" and model.pooling == "unit"


@torch.no_grad()
def start_head(model: SparseExpertModel, task: TrainingTask, *, encoder: Encoder) -> None:
    """Let a head tell which class mean lies in the direction of a text, seen from the middle of all.

    Logits are 20 times the cosine where texts point all ways, and smaller where the backbone keeps them close together,
    so that classes which it does not tell apart begin near chance. With few rows a class training ends better, too;
    benchmarks/results.md has the figures ("Ten rows a class"). The name of a class counts as one more text of it, and
    the middle is that of the class means, so that a large class has no more say than a small one.

    Args:
        model: On its device, in evaluation mode, with the task's head.
        task: One that ``has_start``.
        encoder: Of the backbone.
    """
    labels = task.spec.label_names or []
    chosen = list(enumerate(encoder.texts([_BETWEEN.sub(" ", label) for label in labels])))
    counts = [1] * len(labels)
    for example in task.examples:
        (label,) = example.targets
        if counts[label] <= _ROWS:
            counts[label] += 1
            chosen.append((label, example))
    means = torch.zeros(len(labels), model.backbone.hidden_size, device=model.device)
    for members in length_batches([len(text.input_ids) for _, text in chosen], max_tokens=token_limit(model.device)):
        rows = [("", chosen[member][1]) for member in members]
        batch = collate(rows, pad_id=model.backbone.pad_id, device=model.device)
        share = torch.zeros(len(labels), len(rows), device=model.device)  # of each text in the mean of its class
        for place, member in enumerate(members):
            label = chosen[member][0]
            share[label, place] = 1 / counts[label]
        means += share @ pool(model.bare_states(batch), batch.attention_mask, model.pooling)
    middle = means.mean(0)
    linear = model.head(task.spec.name).linear
    linear.weight.copy_(functional.normalize(means - middle, dim=-1) * (_SCALE / len(middle) ** 0.5))
    linear.bias.copy_(-(linear.weight @ middle))
