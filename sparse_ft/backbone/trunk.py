"""The trunk: the blocks below the lowest expert layer.

Its output is the same for all tasks and never changes in training, so it is computed once and cached.
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
    """Ends a forward pass early and carries its hidden states out."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def trunk_bytes(examples: Sequence[Example], *, hidden_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of the cached hidden states of these rows."""
    return sum(len(example.input_ids) for example in examples) * hidden_size * dtype.itemsize


@torch.no_grad()
def cache_trunk(
    encoder: nn.Module,
    blocks: nn.ModuleList,
    examples: Sequence[Example],
    *,
    first_block: int,
    pad_id: int,
    hidden: bool = True,
    means: bool = False,
) -> list[Example]:
    """Run the trunk over rows and cache the states that enter block ``first_block``.

    The batches depend on the rows only, so that a resumed run gets the same numbers bit for bit.

    Args:
        encoder: The backbone's model, in evaluation mode.
        blocks: Its blocks.
        examples: Rows of model input.
        first_block: 0-based index of the lowest block with expert layers; 0 caches the embeddings.
        pad_id: Token id of the padding.
        hidden: Whether to cache the hidden states; False caches the means only.
        means: Whether to cache the means over the tokens of the states that enter each block up to ``first_block``.

    Returns:
        The same rows with ``trunk``, and on the CPU ``means``, filled in.
    """
    device = next(encoder.parameters()).device
    cached = list(examples)
    entering: list[Tensor] = []  # states that enter the blocks of the trunk, [N, S, hidden] each
    with _stopping_before(blocks[first_block]), _recording(blocks[:first_block] if means else [], entering):
        for members in length_batches([len(example.input_ids) for example in examples], max_tokens=token_limit(device)):
            rows = [("", replace(examples[member], targets=[])) for member in members]  # of several tasks, no targets
            batch = collate(rows, pad_id=pad_id, device=device)
            inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if batch.token_type_ids is not None:
                inputs["token_type_ids"] = batch.token_type_ids
            try:
                encoder(**inputs)
            except _Reached as reached:
                for member, states in zip(members, reached.hidden, strict=True) if hidden else ():
                    size = len(examples[member].input_ids)
                    cached[member] = replace(examples[member], trunk=states[:size].clone())
                if means:
                    pooled = [pool(states, batch.attention_mask, "mean") for states in (*entering, reached.hidden)]
                    for member, row in zip(members, torch.stack(pooled, 1).cpu(), strict=True):
                        cached[member] = replace(cached[member], means=row)
                entering.clear()
    return cached


@contextlib.contextmanager
def _recording(blocks: Iterable[nn.Module], into: list[Tensor]) -> Iterator[None]:
    """Append the states that enter each of the blocks to a list."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _stopping_before(block: nn.Module) -> Iterator[None]:
    """Raise _Reached with the states that enter a block."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
