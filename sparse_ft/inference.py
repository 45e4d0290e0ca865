"""Run examples through the model and sort the logits back to the texts they came from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ft.batching import collate, length_batches
from sparse_ft.encoding import Example
from sparse_ft.model import SparseExpertModel

MAX_TOKENS = 4096
"""Per batch: keeps the matrices inside the caches of a CPU and a small GPU busy."""

_NEVER = -1e4
"""Logit of every tag but O for a word that the tokenizer dropped, so that it is O with certainty."""


@torch.no_grad()
def row_logits(
    model: SparseExpertModel,
    task: str,
    examples: Sequence[Example],
    *,
    num_rows: int,
    num_words: Sequence[int] | None = None,
) -> list[Tensor]:
    """Compute the logits of one task for each text.

    Args:
        model: In evaluation mode.
        task: One of its tasks.
        examples: Rows of model input; windows of one text share a ``row``.
        num_rows: Number of texts.
        num_words: Words of each text, for tasks that tag words.

    Returns:
        One float32 CPU tensor a text: (labels,), or (words, tags).
    """
    num_outputs = model.head(task).linear.out_features
    if num_words is None:
        rows = [torch.zeros(num_outputs) for _ in range(num_rows)]
    else:
        untagged = torch.full((num_outputs,), _NEVER)
        untagged[0] = 0.0
        rows = [untagged.repeat(words, 1) for words in num_words]
    for members in length_batches([len(example.input_ids) for example in examples], max_tokens=MAX_TOKENS):
        chosen = [examples[member] for member in members]
        batch = collate([(task, example) for example in chosen], pad_id=model.backbone.pad_id, device=model.device)
        logits = model(batch)[task].float().cpu()
        if num_words is None:
            for example, row in zip(chosen, logits, strict=True):
                rows[example.row] = row
            continue
        start = 0
        for example in chosen:
            stop = start + len(example.word_indices)
            rows[example.row][example.word_indices] = logits[start:stop]
            start = stop
    return rows
