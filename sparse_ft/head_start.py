"""Where the head of a new task begins: at its classes, as the backbone sees them before anything is learnt."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sparse_ft.batching import collate, length_batches, token_limit
from sparse_ft.encoding import Encoder, Example
from sparse_ft.heads import pool
from sparse_ft.model import SparseExpertModel
from sparse_ft.routing import Routing
from sparse_ft.training_data import TrainingTask

_ROWS = 50
"""Of each class; more say little more about a mean."""

_SCALE = 20.0
"""Logits begin as so many times a cosine, with which sentence-transformers trains, too:
https://github.com/UKPLab/sentence-transformers/blob/v3.0.0/sentence_transformers/losses/MultipleNegativesRankingLoss.py.
"""

_LEAST = 1e-6
"""Length that is divided by where all texts are the same."""


@torch.no_grad()
def start_head(model: SparseExpertModel, task: TrainingTask, *, encoder: Encoder) -> None:
    """Let a head tell which class mean points the same way as a text: 20 times the cosine, seen from the mean of all.

    With few rows a class that is a better start than chance, and training ends better, too; benchmarks/results.md has
    the figures. The name of a class counts as one more text of it.

    Args:
        model: On its device, with the task's head; its experts do not count.
        task: Of the kind classification.
        encoder: Of the backbone.
    """
    names = encoder.texts([label.replace("_", " ").replace("-", " ") for label in task.spec.label_names or []])
    classes = [[name] for name in names]
    for example in task.examples:
        own = classes[example.targets[0]]
        if len(own) <= _ROWS:
            own.append(example)
    vectors = _bare_vectors(model, task.spec.name, [example for own in classes for example in own])
    middle = vectors.mean(0)
    centred = vectors - middle
    means = torch.stack([own.mean(0) for own in centred.split([len(own) for own in classes])])  # [classes, hidden]
    length = centred.norm(dim=-1).mean().clamp_min(_LEAST)
    linear = model.head(task.spec.name).linear
    linear.weight.copy_(functional.normalize(means, dim=-1) * (_SCALE / length))
    linear.bias.copy_(-(linear.weight @ middle))


def _bare_vectors(model: SparseExpertModel, task: str, examples: Sequence[Example]) -> Tensor:
    """Pool texts as the head will read them, but without any expert: [examples, hidden] float32."""
    vectors = torch.empty(len(examples), model.backbone.hidden_size, device=model.device)
    lengths = [len(example.input_ids) for example in examples]
    for members in length_batches(lengths, max_tokens=token_limit(model.device)):
        rows = [(task, replace(examples[member], targets=[])) for member in members]
        batch = collate(rows, pad_id=model.backbone.pad_id, device=model.device)
        nobody = torch.zeros(len(rows), 1, device=model.device)
        hidden = model.hidden_states(batch, routing=Routing(nobody.long(), nobody))
        vectors[members] = pool(hidden, batch.attention_mask, model.pooling)
    return vectors
