"""The plan of a forward pass: which rows of a batch share which blocks.

Rows that read the same tokens have the same hidden states up to the first block that their experts change in different
ways. A pass therefore begins with one row for each distinct input, and rows part where their experts do: a tree over
the blocks, each node of which is computed once. Shapes: N rows of the batch, U rows that run in a stretch of blocks.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from sparse_ft.backbone.batching import Batch
from sparse_ft.experts.named_experts import Experts
from sparse_ft.experts.routing import ForwardPass, Routing, Split

Path = tuple[Hashable, ...]
"""What changes each block for a row; two rows with equal inputs and equal beginnings of their paths share the blocks
of these beginnings."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks that the same U rows pass."""

    first_block: int
    """0-based."""
    rows: list[int]
    """For each of the U rows, one of the rows of the batch that it stands for."""
    parents: list[int]
    """For each of the U rows, the row of the stretch below that it continues; empty in the lowest stretch."""
    bases: list[int]
    """For each of the U rows, the row of the lowest stretch that it began as."""


@dataclass(frozen=True)
class Plan:
    """The stretches of a forward pass, from the bottom to the top."""

    stretches: list[Stretch]
    leaves: list[int]
    """For each of the N rows of the batch, its row in the highest stretch."""
    num_blocks: int

    @property
    def row_blocks(self) -> int:
        """Number of blocks that run, counted once for each row that runs through them."""
        ends = [*(stretch.first_block for stretch in self.stretches[1:]), self.num_blocks]
        return sum(
            len(stretch.rows) * (end - stretch.first_block) for stretch, end in zip(self.stretches, ends, strict=True)
        )

    @property
    def passes(self) -> float:
        """Work of the plan, in passes of one row through all blocks."""
        return self.row_blocks / self.num_blocks


def plan_rows(inputs: Sequence[Hashable], paths: Sequence[Path], *, num_blocks: int) -> Plan:
    """Let rows share every block up to the first in which their paths differ.

    Args:
        inputs: What the backbone reads of each row, (N,).
        paths: The path of each row, (N,), each of ``num_blocks`` entries.
        num_blocks: Blocks of the backbone.
    """
    stretches: list[Stretch] = []
    nodes = _numbers(inputs)  # of each row of the batch, the row that it is at present
    for block in range(num_blocks):
        below, nodes_below = stretches[-1] if stretches else None, nodes
        nodes = _numbers(list(zip(nodes, (path[block] for path in paths), strict=True)))
        if below is not None and max(nodes) < len(below.rows):
            continue
        rows = _first_indices(nodes)
        parents = [] if below is None else [nodes_below[row] for row in rows]
        bases = list(range(len(rows))) if below is None else [below.bases[parent] for parent in parents]
        stretches.append(Stretch(block, rows, parents, bases))
    return Plan(stretches, nodes, num_blocks)


def _numbers(values: Sequence[Hashable]) -> list[int]:
    """Number equal values alike, from 0, in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _first_indices(numbers: Sequence[int]) -> list[int]:
    """Return where each number from 0 appears first."""
    first = {number: index for index, number in reversed(list(enumerate(numbers)))}
    return [first[number] for number in range(len(first))]


def plan_batch(batch: Batch, routing: Routing, experts: Experts, *, num_blocks: int, gated: bool) -> Plan | None:
    """Return how the rows of a batch share blocks; None if they share none.

    Args:
        batch: N rows.
        routing: Routing of the rows.
        experts: Experts of the model.
        num_blocks: Blocks of the backbone.
        gated: Whether a gate decides at every block by the hidden states, in addition to ``routing``. Rows of equal
            hidden states then have equal experts.
    """
    if routing.by_token:
        return None
    inputs = _inputs(batch)
    shapes = [()] * len(inputs) if batch.word_shapes is None else [tuple(row) for row in batch.word_shapes.tolist()]
    paths = expert_paths(routing, shapes, experts, num_blocks=num_blocks)
    if gated:
        seen = shapes if experts.word_shapes.blocks_of(None) else [()] * len(inputs)
        inputs, paths = list(zip(inputs, paths, seen, strict=True)), [(None,) * num_blocks] * len(inputs)
    plan = plan_rows(inputs, paths, num_blocks=num_blocks)
    return plan if plan.row_blocks < len(inputs) * num_blocks else None


def plan_tasks(
    inputs: Sequence[Hashable],
    used: Sequence[Sequence[str]],
    shaped: Sequence[bool],
    experts: Experts,
    *,
    num_blocks: int,
) -> Plan:
    """Return how the answers of N tasks to one text share blocks.

    Args:
        inputs: What each task reads of the text, (N,).
        used: Names of the experts that answer each task, (N,).
        shaped: Whether each task reads word shapes where its experts have them, (N,).
        experts: Experts of the model.
        num_blocks: Blocks of the backbone.
    """
    weights = torch.zeros(len(used), len(experts.names))
    for row, names in enumerate(used):
        weights[row, [experts.index(name) for name in names]] = 1.0
    shapes = [(1,) if reads_shapes else () for reads_shapes in shaped]
    return plan_rows(
        inputs, expert_paths(Routing(None, weights), shapes, experts, num_blocks=num_blocks), num_blocks=num_blocks
    )


def _inputs(batch: Batch) -> list[Hashable]:
    """Return what the backbone reads of each row."""
    types = batch.input_ids if batch.token_type_ids is None else batch.token_type_ids
    lengths = batch.attention_mask.sum(-1).tolist()
    rows = zip(batch.input_ids.tolist(), types.tolist(), lengths, strict=True)
    return [(tuple(ids[:length]), tuple(kinds[:length])) for ids, kinds, length in rows]


def expert_paths(
    routing: Routing, shapes: Sequence[tuple[int, ...]], experts: Experts, *, num_blocks: int
) -> list[Path]:
    """Return the path of each row: the experts that change each block, their weights, and the word shapes they read.

    Args:
        routing: Routing of the rows.
        shapes: Word shapes of each row; empty or all 0 for a row without words.
        experts: Experts of the model.
        num_blocks: Blocks of the backbone.
    """
    every = list(range(len(experts.names)))
    indices = [every] * len(routing.weights) if routing.experts is None else routing.experts.tolist()
    known: dict[Hashable, Path] = {}
    paths = []
    for chosen, weights, seen in zip(indices, routing.weights.tolist(), shapes, strict=True):
        serving = tuple((index, weight) for index, weight in zip(chosen, weights, strict=True) if weight)
        if (serving, seen) not in known:
            known[serving, seen] = tuple(
                tuple(
                    (content, weight, seen if any(seen) and experts.word_shapes.starts(index, block) else ())
                    for index, weight in serving
                    if (content := experts.content(index, block)) is not None
                )
                for block in range(num_blocks)
            )
        paths.append(known[serving, seen])
    return paths


def planned_pass(plan: Plan, routing: Routing) -> ForwardPass:
    """Return the forward pass of a plan.

    Args:
        plan: How the rows of the batch share blocks.
        routing: Routing of the N rows; a gate that decides at every block replaces it, and its rows never part.
    """
    device = routing.weights.device
    lowest, *others = plan.stretches
    running = ForwardPass(routing.take(lowest.rows), torch.tensor(lowest.rows, device=device))
    running.num_bases = len(lowest.rows)
    for stretch in others:
        parents, bases, rows = (torch.tensor(p, device=device) for p in (stretch.parents, stretch.bases, stretch.rows))
        running.splits[stretch.first_block] = Split(parents, bases, rows, routing.take(stretch.rows))
    return running
