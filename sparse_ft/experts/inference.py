"""Run examples through the model and sort the logits back to the texts they came from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.batching import collate, length_batches, token_limit
from sparse_ft.backbone.encoding import NEVER, Example
from sparse_ft.backbone.trunk import keep_trunk
from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import Gate, SequenceGate, TokenGate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import ForwardPass, Routing


class EncodedTexts(NamedTuple):
    """Texts as one task reads them."""

    examples: Sequence[Example]
    """Rows of model input; windows of one text share a ``row``."""
    num_rows: int
    """Number of texts."""
    num_parts: Sequence[int] | None
    """Words or choices of each text, for tasks that give logits for these; see ``TaskKind.parts``."""


@torch.no_grad()
def logits_by_task(model: SparseExpertModel, asked: Mapping[str, EncodedTexts]) -> dict[str, list[Tensor]]:
    """Compute the logits of several tasks, each for its own texts, in batches that hold rows of all of them.

    Args:
        model: In evaluation mode.
        asked: Task to its texts; tasks that one expert serves.

    Returns:
        Task to one float32 CPU tensor a text, as ``row_logits`` gives them.
    """
    found = {task: _blank(model, task, own) for task, own in asked.items()}
    pairs = [(task, example) for task, own in asked.items() for example in own.examples]
    for members in _batches([example for _, example in pairs], model.device):
        chosen = [pairs[member] for member in sorted(members)]  # the rows of a task side by side
        batch = collate(chosen, pad_id=model.backbone.pad_id, device=model.device)
        logits = model(batch)
        for rows in batch.tasks:
            own = [example for _, example in chosen[rows.start : rows.stop]]
            _sort_back(
                logits[rows.task].float().cpu(),
                own,
                by_part=asked[rows.task].num_parts is not None,
                into=found[rows.task],
            )
    return found


@torch.no_grad()
def row_logits(
    model: SparseExpertModel,
    task: str,
    examples: Sequence[Example],
    *,
    num_rows: int,
    num_parts: Sequence[int] | None = None,
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
        num_parts: Words or choices of each text, for tasks that give logits for these; see ``TaskKind.parts``.
        routing: Of the examples; None takes the task's expert, or asks the model's gate if the task was trained so.
        gate: Asked at every block in place of ``routing``.
        usage: [examples, blocks, experts], filled with the mean weight that ``gate`` gave each expert over the tokens;
            blocks from ``model.first_block`` on.

    Returns:
        One float32 CPU tensor a text: (labels,), or (words, tags), or (choices, 1).
    """
    asked = routing is None and gate is None and model.tasks[task].gated and not isinstance(model.gate, TokenGate)
    if asked and any(example.hidden is None for example in examples):
        routing = text_routing(model, examples, task=task)
    rows = _blank(model, task, EncodedTexts(examples, num_rows, num_parts))
    for members in _batches(examples, model.device):
        chosen = [examples[member] for member in members]
        batch = collate([(task, example) for example in chosen], pad_id=model.backbone.pad_id, device=model.device)
        own = None if routing is None else routing.take(members)
        seen: dict[int, Routing] = {}
        logits = model(batch, routing=own, gate=gate, seen=seen)[task].float().cpu()
        if usage is not None:
            usage[members] = _mean_weights(seen, batch.attention_mask, len(model.experts.names)).cpu()
        _sort_back(logits, chosen, by_part=num_parts is not None, into=rows)
    return rows


def _blank(model: SparseExpertModel, task: str, asked: EncodedTexts) -> list[Tensor]:
    """Return the logits of texts of which nothing was computed: words that the backbone does not see are untagged."""
    num_outputs = model.head(task).linear.out_features
    if asked.num_parts is None:
        return [torch.zeros(num_outputs) for _ in range(asked.num_rows)]
    untagged = torch.full((num_outputs,), NEVER)
    untagged[0] = 0.0
    return [untagged.repeat(parts, 1) for parts in asked.num_parts]


def _sort_back(logits: Tensor, examples: Sequence[Example], *, by_part: bool, into: list[Tensor]) -> None:
    """Put the logits of one task in a batch, one a row or one a word, where their texts are."""
    if not by_part:
        for example, row in zip(examples, logits, strict=True):
            into[example.row] = row
        return
    start = 0
    for example in examples:
        stop = start + len(example.word_indices)
        into[example.row][example.word_indices] = logits[start:stop]
        start = stop


def _mean_weights(seen: Mapping[int, Routing], attention_mask: Tensor, num_experts: int) -> Tensor:
    """Average the weights that each block was given over real tokens: [N, blocks, E]."""
    real = attention_mask.unsqueeze(-1).float()  # [N, S, 1]
    blocks = [(seen[block].dense_weights(num_experts) * real).sum(1) / real.sum(1) for block in sorted(seen)]
    return torch.stack(blocks, dim=1)


def _batches(examples: Sequence[Example], device: torch.device) -> Iterator[list[int]]:
    """Group examples of similar length; those with a kept trunk among themselves, for it helps only if all have it."""
    for kept in (True, False):
        group = [place for place, example in enumerate(examples) if (example.trunk is not None) is kept]
        for members in length_batches(
            [len(examples[place].input_ids) for place in group], max_tokens=token_limit(device)
        ):
            yield [group[member] for member in members]


@torch.no_grad()
def text_routing(model: SparseExpertModel, examples: Sequence[Example], *, task: str | None = None) -> Routing:
    """Let the gate choose experts for each example.

    Args:
        model: In evaluation mode.
        examples: Rows of model input.
        task: That they belong to, if it is known; the gate then chooses among its experts if it was not trained to mix
            all of them.
    """
    gate = model.text_gate() if task is None else model.gate
    if not isinstance(gate, SequenceGate):
        raise ConfigError(f"Task {task!r} needs a gate that chooses among its experts, and this model has none.")
    excluded: list[int] = []
    if task is not None and not model.tasks[task].joint:
        excluded = [place for place, name in enumerate(gate.names) if name not in model.tasks[task].experts]
    means = mean_states(model, examples, block=gate.block).to(model.device)
    tokens = [example.input_ids for example in examples] if task is None else None  # a known task is never unknown
    return model.reindexed(gate.decide(means, tokens, excluded=excluded, abstains=task is None))


@torch.no_grad()
def with_hidden_states(
    model: SparseExpertModel, task: str, examples: Sequence[Example], *, routing: Routing | None = None
) -> tuple[list[Example], Tensor]:
    """Run examples through backbone and experts, once for the heads of all tasks that share the routing.

    Args:
        model: In evaluation mode.
        task: One of the tasks; the others must use the same shared expert.
        examples: Rows of model input.
        routing: Of the examples; None lets the gate mix, for tasks that were trained so.

    Returns:
        The examples with ``hidden`` filled, and the mean weight of each expert, [examples, experts].
    """
    kept = list(examples)
    usage = torch.zeros(len(examples), len(model.experts.names))
    if routing is None and not isinstance(model.gate, TokenGate):
        routing = text_routing(model, examples, task=task)
    if routing is not None:
        usage.copy_(routing.dense_weights(usage.shape[1]))
    for members in _batches(examples, model.device):
        chosen = [examples[member] for member in members]
        batch = collate([(task, example) for example in chosen], pad_id=model.backbone.pad_id, device=model.device)
        seen: dict[int, Routing] = {}
        own = None if routing is None else routing.take(members)
        hidden = model.hidden_states(batch, routing=own, seen=seen)
        if routing is None:
            usage[members] = _mean_weights(seen, batch.attention_mask, usage.shape[1]).mean(1).cpu()
        for member, row in zip(members, hidden, strict=True):
            kept[member] = replace(examples[member], hidden=row[: len(examples[member].input_ids)].clone())
    return kept, usage


def with_trunks(
    model: SparseExpertModel,
    examples: Sequence[Example],
    *,
    block: int | None = None,
    hidden: bool = True,
    means: bool = False,
) -> list[Example]:
    """Run the bare backbone up to a block, and keep what enters it in each example's ``trunk``.

    Args:
        model: In evaluation mode.
        examples: Rows of model input.
        block: 0-based; None takes the lowest with experts, below which all experts share the blocks.
        hidden: Whether to keep the hidden states; without, only the means are.
        means: Whether to keep the mean of what enters each block up to there, too.
    """
    backbone = model.backbone
    last = backbone.num_blocks - 1
    wanted = min(model.first_block, last) if block is None else block  # a model without experts has none to enter
    with model.slot.filled(ForwardPass(None)):
        return keep_trunk(
            backbone.model,
            backbone.blocks,
            examples,
            first_block=wanted,
            pad_id=backbone.pad_id,
            hidden=hidden,
            means=means,
        )


def stacked_means(examples: Sequence[Example]) -> Tensor:
    """Return the ``means`` that the examples carry, [examples, blocks, hidden] float32."""
    return torch.stack([example.means for example in examples if example.means is not None])


def mean_states(model: SparseExpertModel, examples: Sequence[Example], *, block: int) -> Tensor:
    """Return the mean over the tokens of what enters each block from the lowest to this one.

    Args:
        model: In evaluation mode.
        examples: Rows of model input, at least one.
        block: 0-based; the last that is read.

    Returns:
        [examples, block + 1, hidden] float32, on the CPU.
    """
    return stacked_means(with_trunks(model, examples, block=block, hidden=False, means=True))
