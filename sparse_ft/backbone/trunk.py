"""The trunk: what lies below the lowest expert layer.

It is the same for all tasks and never changes in training, so it is computed once, and later passes start from there.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone.batching import collate, length_batches, token_limit
from sparse_ft.backbone.encoding import Example
from sparse_ft.backbone.pooling import pool


class _Reached(Exception):
    """Carries the hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def trunk_bytes(examples: Sequence[Example], *, hidden_size: int, dtype: torch.dtype) -> int:
    """Say how much memory the kept hidden states of these rows take."""
    return sum(len(example.input_ids) for example in examples) * hidden_size * dtype.itemsize


@torch.no_grad()
def keep_trunk(
    encoder: nn.Module,
    blocks: nn.ModuleList,
    examples: Sequence[Example],
    *,
    first_block: int,
    pad_id: int,
    hidden: bool = True,
    means: bool = False,
) -> list[Example]:
    """Run the trunk over rows and keep what enters block ``first_block``.

    The batches depend on the rows only, so that a resumed run gets the same numbers bit for bit.

    Args:
        encoder: The backbone's model, in evaluation mode.
        blocks: Its blocks.
        examples: Rows of model input.
        first_block: Lowest block with expert layers; 0 keeps the embeddings.
        pad_id: Token id for padding.
        hidden: Whether to keep the hidden states; without, only the means are.
        means: Whether to note the mean over the tokens of what enters each block up to there, too.

    Returns:
        The same rows with ``trunk`` filled, and ``means`` on the CPU if asked.
    """
    device = next(encoder.parameters()).device
    kept = list(examples)
    passed: list[Tensor] = []  # what entered the blocks before, [N, S, hidden] each
    with _stopping_before(blocks[first_block]), _noting(blocks[:first_block] if means else [], passed):
        for members in length_batches([len(example.input_ids) for example in examples], max_tokens=token_limit(device)):
            rows = [("", replace(examples[member], targets=[])) for member in members]  # of any tasks, so no answers
            batch = collate(rows, pad_id=pad_id, device=device)
            inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if batch.token_type_ids is not None:
                inputs["token_type_ids"] = batch.token_type_ids
            try:
                encoder(**inputs)
            except _Reached as reached:
                for member, states in zip(members, reached.hidden, strict=True) if hidden else ():
                    size = len(examples[member].input_ids)
                    kept[member] = replace(examples[member], trunk=states[:size].clone())
                if means:
                    pooled = [pool(states, batch.attention_mask, "mean") for states in (*passed, reached.hidden)]
                    for member, row in zip(members, torch.stack(pooled, 1).cpu(), strict=True):
                        kept[member] = replace(kept[member], means=row)
                passed.clear()
    return kept


@contextlib.contextmanager
def _noting(blocks: Iterable[nn.Module], into: list[Tensor]) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _stopping_before(block: nn.Module) -> Iterator[None]:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
