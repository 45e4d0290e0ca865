"""Run examples through the model in batches of similar length, and return the results by text or example."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.batching import Batch, collate, length_batches, token_limit
from sparse_ft.backbone.encoding import NO_TOKEN_LOGIT, Example
from sparse_ft.backbone.trunk import cache_trunk
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.gates import Gate, SequenceGate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.progress import progress_bar


class EncodedTexts(NamedTuple):
    """Texts encoded for one task."""

    examples: Sequence[Example]
    """Rows of model input; windows of one text share a ``row``."""
    num_rows: int
    """Number of texts."""
    num_parts: Sequence[int] | None
    """Words or choices of each text, for tasks that give logits for these; see ``TaskKind.num_parts``."""


@torch.no_grad()
def logits_by_task(
    model: SparseExpertModel,
    texts: Mapping[str, EncodedTexts],
    *,
    routing: Routing | None = None,
    gate: Gate | None = None,
    usage: Tensor | None = None,
    title: str | None = None,
) -> dict[str, list[Tensor]]:
    """Compute the logits of one or several tasks, each for its texts, in batches that hold rows of all of them.

    Args:
        model: In evaluation mode.
        texts: Task to its texts.
        routing: Routing of all examples, task after task; None takes the expert of each task, or the model's token gate
            for joint tasks.
        gate: Decides at every block instead of ``routing``.
        usage: [examples, blocks, experts], filled with the mean weight that ``gate`` gave each expert over the tokens;
            blocks from ``model.first_block`` on.
        title: Of a progress bar; None shows none.

    Returns:
        Task to one float32 CPU tensor a text: (labels,), or (words, tags), or (choices, 1).

    Raises:
        CheckpointError: If a logit is not finite.
    """
    results = {task: _blank_logits(model, task, encoded) for task, encoded in texts.items()}
    pairs = [(task, example) for task, encoded in texts.items() for example in encoded.examples]
    for members, batch in _batches(model, pairs, title=title):
        taken = None if routing is None else routing.take(members)
        block_routings: dict[int, Routing] = {}
        logits = model(batch, routing=taken, gate=gate, block_routings=block_routings)
        if usage is not None:
            usage[members] = _mean_weights(block_routings, batch, len(model.experts.names)).cpu()
        for rows in batch.tasks:
            examples = [pairs[member][1] for member in members[rows.start : rows.stop]]
            task_logits = logits[rows.task].float().cpu()
            if not bool(task_logits.isfinite().all()):
                raise _not_finite(model, rows.task, taken)
            _scatter(task_logits, examples, texts[rows.task].num_parts, into=results[rows.task])
    return results


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
    title: str | None = None,
) -> list[Tensor]:
    """Compute the logits of one task; see ``EncodedTexts`` and ``logits_by_task`` for the arguments."""
    texts = {task: EncodedTexts(examples, num_rows, num_parts)}
    return logits_by_task(model, texts, routing=routing, gate=gate, usage=usage, title=title)[task]


def _blank_logits(model: SparseExpertModel, task: str, texts: EncodedTexts) -> list[Tensor]:
    """Return the logits of texts without any token: words that the backbone does not see are untagged."""
    num_outputs = model.head(task).linear.out_features
    if texts.num_parts is None:
        return [torch.zeros(num_outputs) for _ in range(texts.num_rows)]
    untagged = torch.full((num_outputs,), NO_TOKEN_LOGIT)
    untagged[0] = 0.0
    return [untagged.repeat(parts, 1) for parts in texts.num_parts]


def _scatter(
    logits: Tensor, examples: Sequence[Example], num_parts: Sequence[int] | None, *, into: list[Tensor]
) -> None:
    """Write the logits of one task in a batch, one a row or one a word, to the texts of its examples."""
    if num_parts is None:
        for example, row in zip(examples, logits, strict=True):
            into[example.row] = row
        return
    parts = logits.split([len(example.word_indices) for example in examples])
    for example, part in zip(examples, parts, strict=True):
        into[example.row][example.word_indices] = part


def _not_finite(model: SparseExpertModel, task: str, routing: Routing | None) -> CheckpointError:
    """Return the error for logits that are NaN or infinite, with the experts of the batch."""
    names = model.tasks[task].experts
    if routing is not None:
        used = routing.dense_weights(len(model.experts.names)).flatten(0, -2).ne(0).any(0).tolist()
        names = tuple(name for name, use in zip(model.experts.names, used, strict=True) if use)
    experts = ", ".join(map(repr, names)) or "none"
    return CheckpointError(
        f"Task {task!r} has logits that are NaN or infinite, from its head and the experts {experts}. Expected finite "
        "numbers: their weights, or lora_alpha in adapter_config.json, are damaged or too large. Restore the "
        "checkpoint from a copy, or train again with a lower train.learning_rate."
    )


def _mean_weights(block_routings: Mapping[int, Routing], batch: Batch, num_experts: int) -> Tensor:
    """Average the weights that each block was given over real tokens: [N, blocks, E]."""
    real = batch.attention_mask.unsqueeze(-1).float()  # [N, S, 1]
    weights = [block_routings[block].dense_weights(num_experts) for block in sorted(block_routings)]
    return torch.stack([(block * real).sum(1) / real.sum(1) for block in weights], dim=1)


def _batches(
    model: SparseExpertModel, pairs: Sequence[tuple[str, Example]], *, title: str | None = None
) -> Iterator[tuple[list[int], Batch]]:
    """Collate (task, example) pairs of similar length; yield the indices of the pairs and their batch.

    Examples with a cached trunk have batches of their own, because a trunk saves time only if all rows have one.
    """
    several = len({task for task, _ in pairs}) > 1
    with progress_bar(title, total=len(pairs)) as bar:
        for cached in (True, False):
            group = [index for index, (_, example) in enumerate(pairs) if (example.trunk is not None) is cached]
            examples = [pairs[index][1] for index in group]
            lengths = [len(example.input_ids) for example in examples]
            inputs = [(tuple(example.input_ids), tuple(example.token_type_ids or ())) for example in examples]
            for batch in length_batches(lengths, max_tokens=token_limit(model.device), inputs=inputs):
                members = [group[member] for member in batch]
                if several:
                    members.sort()  # the rows of a task must be adjacent
                rows = [pairs[member] for member in members]
                yield members, collate(rows, pad_id=model.backbone.pad_id, device=model.device)
                bar.update(len(members))


def with_trunks(
    model: SparseExpertModel,
    examples: Sequence[Example],
    *,
    block: int | None = None,
    expert: str | None = None,
    hidden: bool = True,
    means: bool = False,
    title: str | None = None,
) -> list[Example]:
    """Run texts up to a block, and return the examples with the states that enter it as their ``trunk``.

    Args:
        model: In evaluation mode.
        examples: Rows of model input.
        block: 0-based; None takes the lowest in which the tasks of the model part.
        expert: Changes the blocks; None leaves them bare.
        hidden: Whether to store the hidden states; if not, only the means are stored.
        means: Whether to store the mean of the states that enter each block up to there, too.
        title: Of a progress bar; None shows none.
    """
    backbone = model.backbone
    return cache_trunk(
        backbone,
        examples,
        first_block=model.parting_block if block is None else block,
        run=functools.partial(model.states_by, expert),
        hidden=hidden,
        means=means,
        title=title,
    )


def stacked_means(examples: Sequence[Example]) -> Tensor:
    """Return the ``means`` of examples, [examples, blocks, hidden] float32."""
    return torch.stack([example.means for example in examples if example.means is not None])


def mean_states(
    model: SparseExpertModel,
    examples: Sequence[Example],
    *,
    block: int,
    expert: str | None = None,
    title: str | None = None,
) -> Tensor:
    """Return the mean over the tokens of the states that enter each block.

    Args:
        model: In evaluation mode.
        examples: Rows of model input, at least one.
        block: The last block, 0-based.
        expert: Changes the blocks; None leaves them bare.
        title: Of a progress bar; None shows none.

    Returns:
        [examples, block + 1, hidden] float32, on the CPU.
    """
    read = with_trunks(model, examples, block=block, expert=expert, hidden=False, means=True, title=title)
    return stacked_means(read)


def gate_states(
    model: SparseExpertModel, gate: SequenceGate, examples: Sequence[Example], *, title: str | None = None
) -> Tensor:
    """Return the mean states that a gate reads of texts, [examples, block + 1, hidden]; see ``mean_states``."""
    return mean_states(model, examples, block=gate.block, expert=gate.trunk_expert, title=title)
