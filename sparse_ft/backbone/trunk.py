"""The trunk: the blocks below the first one in which tasks differ, bare or with an expert that the tasks share.

Unless an expert in them is being trained, their output is computed once and cached.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.batching import Batch, collate, length_batches, token_limit
from sparse_ft.backbone.encoding import Example
from sparse_ft.backbone.pooling import pool
from sparse_ft.progress import progress_bar


class _Reached(Exception):
    """Ends a forward pass early and carries its hidden states out."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def trunk_bytes(backbone: Backbone, examples: Sequence[Example]) -> int:
    """Return the bytes of the cached hidden states of these rows."""
    itemsize = next(backbone.model.parameters()).dtype.itemsize
    return sum(len(example.input_ids) for example in examples) * backbone.hidden_size * itemsize


@torch.no_grad()
def cache_trunk(
    backbone: Backbone,
    examples: Sequence[Example],
    *,
    first_block: int,
    run: Callable[[Batch], object],
    hidden: bool = True,
    means: bool = False,
    title: str | None = None,
) -> list[Example]:
    """Run the trunk over rows and cache the states that enter block ``first_block``.

    The batches depend on the rows only, so that a resumed run gets the same numbers bit for bit.

    Args:
        backbone: The backbone, in evaluation mode.
        examples: Rows of model input.
        first_block: 0-based index of the block that the states enter; 0 caches the embeddings.
        run: Runs a batch through the backbone.
        hidden: Whether to cache the hidden states; False caches the means only.
        means: Whether to cache the means over the tokens of the states that enter each block up to ``first_block``.
        title: Of a progress bar; None shows none.

    Returns:
        The same rows with ``trunk``, and on the CPU ``means``, filled in.
    """
    device, blocks = next(backbone.model.parameters()).device, backbone.blocks
    cached = list(examples)
    entering: list[Tensor] = []  # states that enter the blocks of the trunk, [N, S, hidden] each
    with (
        progress_bar(title, total=len(examples)) as bar,
        _before([blocks[first_block]], _stop),
        _before(blocks[:first_block] if means else [], entering.append),
    ):
        for members in length_batches([len(example.input_ids) for example in examples], max_tokens=token_limit(device)):
            rows = [("", replace(examples[member], targets=[], trunk=None)) for member in members]  # of several tasks
            batch = collate(rows, pad_id=backbone.pad_id, device=device)
            try:
                run(batch)
            except _Reached as reached:
                for member, states in zip(members, reached.hidden, strict=True) if hidden else ():
                    size = len(examples[member].input_ids)
                    cached[member] = replace(examples[member], trunk=states[:size].clone())
                if means:
                    pooled = [pool(states, batch.attention_mask, "mean") for states in (*entering, reached.hidden)]
                    for member, row in zip(members, torch.stack(pooled, 1).cpu(), strict=True):
                        cached[member] = replace(cached[member], means=row)
                entering.clear()
            bar.update(len(members))
    return cached


def _stop(hidden: Tensor) -> None:
    raise _Reached(hidden)


@contextlib.contextmanager
def _before(blocks: Iterable[nn.Module], call: Callable[[Tensor], None]) -> Iterator[None]:
    """Call a function with the states that enter each of the blocks."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
