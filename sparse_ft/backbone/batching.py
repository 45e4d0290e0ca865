"""Select the rows of a batch by length and task mixture, and pad them into tensors."""

import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Example

MIXTURES: dict[str, float] = {"proportional": 1.0, "smoothed": 0.5, "uniform": 0.0}
"""Exponent on the number of rows of a task: the share of a task in an epoch is its power over the sum of powers."""

_POOL_BATCHES = 50
"""Rows are sorted by length within pools of this many batches: large enough for little padding (95 % real tokens on
CoNLL-2003), small enough for a random order."""

MAX_TOKENS = 1024
"""Most tokens of a batch in prediction on a CPU; 4,096 take 1.4 to 1.5 times as long (benchmarks/results.md, Speed)."""


@dataclass(frozen=True)
class TaskRows:
    """The adjacent rows of one task in a batch."""

    task: str
    start: int
    stop: int
    words: tuple[Tensor, Tensor] | None
    """Row and token of each classified word, both (words,); None if the pooled text is classified."""
    targets: Tensor | None
    """(rows,) or (words,) class indices, or (rows, labels) 0/1, of the rows that have targets; None in prediction."""


@dataclass(frozen=True)
class Batch:
    """Padded rows of one or several tasks."""

    input_ids: Tensor
    """(rows, tokens)."""
    attention_mask: Tensor
    """(rows, tokens), 1 for real tokens, padding on the right."""
    token_type_ids: Tensor | None
    tasks: list[TaskRows]
    word_shapes: Tensor | None = None
    """(rows, tokens) indices in ``word_shapes.SHAPES``, 0 outside words; None if no row has words."""
    trunk: Tensor | None = None
    """(rows, tokens, hidden) cached states that enter the lowest block with experts; None unless every row has them."""


def collate(rows: Sequence[tuple[str, Example]], *, pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad rows to the length of the longest.

    Args:
        rows: Task name and example of each row; rows of one task are adjacent.
        pad_id: Token id of the padding, which is masked.
        device: Device of the tensors.
    """
    length = max(len(example.input_ids) for _, example in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    types, shapes = (torch.zeros((len(rows), length), dtype=torch.long) for _ in range(2))
    for row, (_, example) in enumerate(rows):
        size = len(example.input_ids)
        input_ids[row, :size] = torch.tensor(example.input_ids)
        attention_mask[row, :size] = 1
        if example.token_type_ids is not None:
            types[row, :size] = torch.tensor(example.token_type_ids)
        if example.word_shapes:
            shapes[row, :size] = torch.tensor(example.word_shapes)
    has_types = any(example.token_type_ids is not None for _, example in rows)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        token_type_ids=types.to(device) if has_types else None,
        tasks=list(_task_rows(rows, device)),
        word_shapes=shapes.to(device) if any(example.word_shapes for _, example in rows) else None,
        trunk=_pad_hidden([example.trunk for _, example in rows], length),
    )


def _pad_hidden(cached: Sequence[Tensor | None], length: int) -> Tensor | None:
    present = [hidden for hidden in cached if hidden is not None]
    if len(present) < len(cached):
        return None
    padded = present[0].new_zeros(len(present), length, present[0].shape[-1])
    for row, hidden in zip(padded, present, strict=True):
        row[: len(hidden)] = hidden
    return padded


def _task_rows(rows: Sequence[tuple[str, Example]], device: torch.device | str) -> Iterator[TaskRows]:
    start = 0
    for task, members in groupby(rows, key=itemgetter(0)):
        examples = [example for _, example in members]
        words = None
        if any(example.word_positions for example in examples):
            word_rows = [row for row, example in enumerate(examples, start) for _ in example.word_positions]
            positions = [position for example in examples for position in example.word_positions]
            words = (torch.tensor(word_rows, device=device), torch.tensor(positions, device=device))
        stop = start + len(examples)
        yield TaskRows(task, start, stop, words, _targets(examples, device))
        start = stop


def _targets(examples: Sequence[Example], device: torch.device | str) -> Tensor | None:
    rows = [example.targets for example in examples if example.targets]
    if not rows:
        return None
    targets = torch.tensor([value for row in rows for value in row], device=device)
    return targets.view(len(rows), -1) if targets.is_floating_point() else targets


def token_limit(device: torch.device) -> int:
    """Return the most tokens of a batch in prediction: few enough for a CPU's caches, or enough to keep a GPU busy."""
    return MAX_TOKENS if device.type == "cpu" else 16 * MAX_TOKENS


def length_batches(
    lengths: Sequence[int], *, max_tokens: int, inputs: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Group rows of similar length for evaluation and prediction, longest first.

    Args:
        lengths: Tokens of each row.
        max_tokens: Most tokens in a batch, padding included; longer rows are a batch of their own.
        inputs: What the backbone reads of each row; rows of equal inputs stay together. None: no two are equal.

    Returns:
        Row indices, every row once.
    """
    equal: dict[Hashable, list[int]] = {}
    for row in range(len(lengths)):
        equal.setdefault(row if inputs is None else inputs[row], []).append(row)
    batches: list[list[int]] = []
    for rows in sorted(equal.values(), key=lambda rows: -lengths[rows[0]]):
        if batches and (len(batches[-1]) + len(rows)) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].extend(rows)
        else:
            batches.append(rows)
    return batches


def draw_rows(sizes: Mapping[str, int], *, mixture: str, generator: random.Random) -> list[tuple[str, int]]:
    """Draw the rows of one epoch, which has as many rows as all tasks together.

    A task whose share exceeds its size is repeated in new orders; otherwise its rows are sampled without replacement.

    Args:
        sizes: Number of rows of each task, at least 1.
        mixture: A key of MIXTURES.
        generator: Source of randomness.

    Returns:
        Task and row of each draw, shuffled.
    """
    exponent = MIXTURES[mixture]
    powers = {task: size**exponent for task, size in sizes.items()}
    total, scale = sum(sizes.values()), sum(powers.values())
    drawn: list[tuple[str, int]] = []
    for task, size in sizes.items():
        # rounded before ceil against float noise, so that proportional draws every row exactly once
        wanted = math.ceil(round(total * powers[task] / scale, 6))
        for _ in range(math.ceil(wanted / size)):
            rows = generator.sample(range(size), size)
            drawn.extend((task, row) for row in rows[: max(0, wanted)])
            wanted -= size
    generator.shuffle(drawn)
    return drawn


def epoch_batches(
    lengths: Mapping[str, Sequence[int]],
    *,
    batch_size: int,
    mixture: str,
    seed: int,
    epoch: int,
    across_tasks: bool = True,
) -> list[list[tuple[str, int]]]:
    """Plan the batches of one epoch; the plan depends on its arguments only, so that a resumed run repeats it.

    Args:
        lengths: Tokens of each row of each task.
        batch_size: Rows per batch.
        mixture: A key of MIXTURES.
        seed: Seed of the run.
        epoch: 0-based index of the epoch.
        across_tasks: Whether a batch may hold rows of several tasks.

    Returns:
        Batches in random order, each a list of (task, row) with the rows of a task adjacent.
    """
    generator = random.Random(f"{seed}/{epoch}")
    drawn = draw_rows({task: len(rows) for task, rows in lengths.items()}, mixture=mixture, generator=generator)
    groups = [drawn] if across_tasks else [[pair for pair in drawn if pair[0] == task] for task in lengths]

    def length(pair: tuple[str, int]) -> int:
        return lengths[pair[0]][pair[1]]

    batches: list[list[tuple[str, int]]] = []
    for group in groups:
        for start in range(0, len(group), batch_size * _POOL_BATCHES):
            pool = sorted(group[start : start + batch_size * _POOL_BATCHES], key=length)
            batches.extend(sorted(pool[first : first + batch_size]) for first in range(0, len(pool), batch_size))
    generator.shuffle(batches)
    return batches
