"""Run examples through the model and sort the logits back to the texts they came from."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparse_ft.batching import collate, length_batches
from sparse_ft.encoding import Example
from sparse_ft.gates import Gate
from sparse_ft.model import SparseExpertModel
from sparse_ft.routing import Pass, Routing
from sparse_ft.trunk import keep_trunk

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
    routing: Routing | None = None,
    gate: Gate | None = None,
    usage: Tensor | None = None,
) -> list[Tensor]:
    """Compute the logits of one task for each text.

    Args:
        model: In evaluation mode.
        task: One of its tasks.
        examples: Rows of model input; windows of one text share a ``row``.
        num_rows: Number of texts.
        num_words: Words of each text, for tasks that tag words.
        routing: Of the examples; None takes the task's expert.
        gate: Asked at every block in place of ``routing``.
        usage: [examples, experts], filled with the mean weight that ``gate`` gave each expert, over tokens and blocks.

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
    for members in _batches(examples):
        chosen = [examples[member] for member in members]
        batch = collate([(task, example) for example in chosen], pad_id=model.backbone.pad_id, device=model.device)
        own = None if routing is None else routing.take(members)
        seen: dict[int, Routing] = {}
        logits = model(batch, routing=own, gate=gate, seen=seen)[task].float().cpu()
        if usage is not None:
            usage[members] = _mean_weights(seen, batch.attention_mask).cpu()
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


def _mean_weights(seen: Mapping[int, Routing], attention_mask: Tensor) -> Tensor:
    """Average the weights [N, S, E] of all blocks over real tokens: [N, E]."""
    real = attention_mask.unsqueeze(-1).float()
    blocks = [(routing.weights * real).sum(1) / real.sum(1) for routing in seen.values()]
    return torch.stack(blocks).mean(0)


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Group examples of similar length; those with a kept trunk among themselves, for it helps only if all have it."""
    for kept in (True, False):
        group = [place for place, example in enumerate(examples) if (example.trunk is not None) is kept]
        for members in length_batches([len(examples[place].input_ids) for place in group], max_tokens=MAX_TOKENS):
            yield [group[member] for member in members]


@torch.no_grad()
def text_routing(model: SparseExpertModel, examples: Sequence[Example]) -> Routing:
    """Let the gate choose experts for each example."""
    gate = model.text_gate()
    means = mean_states(model, examples, block=gate.block).to(model.device)
    return gate.decide(means, [example.input_ids for example in examples])


def entering(
    model: SparseExpertModel, examples: Sequence[Example], *, block: int | None = None, means: bool = False
) -> list[Example]:
    """Run the bare backbone up to a block, and keep what enters it in each example's ``trunk``.

    Args:
        model: In evaluation mode.
        examples: Rows of model input.
        block: 0-based; None takes the lowest with experts, below which all experts share the blocks.
        means: Whether to keep the mean of what enters each block up to there, too.
    """
    backbone = model.backbone
    last = backbone.num_blocks - 1
    wanted = min(model.first_block, last) if block is None else block  # a model without experts has none to enter
    with model.slot.filled(Pass(None)):
        return keep_trunk(
            backbone.model, backbone.blocks, examples, first_block=wanted, pad_id=backbone.pad_id, means=means
        )


def stacked_means(examples: Sequence[Example]) -> Tensor:
    """Return the ``means`` that the examples carry, [examples, blocks, hidden] float32."""
    return torch.stack([example.means for example in examples if example.means is not None])


def mean_states(model: SparseExpertModel, examples: Sequence[Example], *, block: int, size: int = 2048) -> Tensor:
    """Return the mean over the tokens of what enters each block from the lowest to this one.

    Args:
        model: In evaluation mode.
        examples: Rows of model input, at least one.
        block: 0-based; the last that is read.
        size: Examples whose hidden states are in memory at once.

    Returns:
        [examples, block + 1, hidden] float32, on the CPU.
    """
    starts = range(0, len(examples), size)
    parts = (entering(model, examples[start : start + size], block=block, means=True) for start in starts)
    return torch.cat([stacked_means(part).cpu() for part in parts])
