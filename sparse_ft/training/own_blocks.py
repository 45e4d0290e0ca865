"""How many of the highest blocks each task has for itself where all tasks share one expert below, and what it costs."""

from collections.abc import Hashable, Mapping, Sequence


def num_passes(own_blocks: Mapping[str, int], *, num_blocks: int, reads: Mapping[str, Hashable] | None = None) -> float:
    """Return the passes through the backbone that the answers of all tasks to one text cost.

    A block runs once for each task that has it for itself, and once for all the others together.

    Args:
        own_blocks: Task to its own blocks, counted from the top.
        num_blocks: Blocks of the backbone.
        reads: Task to what it reads; tasks that read texts of another form share nothing. None: all read the same.
    """
    rows = 0
    for form in dict.fromkeys((reads or {}).get(task) for task in own_blocks):
        numbers = [number for task, number in own_blocks.items() if (reads or {}).get(task) == form]
        for above in range(num_blocks):  # blocks above this one
            own = sum(number > above for number in numbers)
            rows += own + (own < len(numbers))
    return rows / num_blocks


def choose_own_blocks(
    tasks: Sequence[str],
    *,
    passes: float,
    num_blocks: int,
    fixed: Mapping[str, int],
    drops: Mapping[str, float],
    reads: Mapping[str, Hashable] | None = None,
) -> dict[str, int]:
    """Give the tasks own blocks by d'Hondt's rule: the next block to the largest drop / (1 + blocks that it has).

    https://en.wikipedia.org/wiki/D%27Hondt_method, with drops for votes and blocks for seats.

    A block that does not fit the budget is not given, and its task gets no more.

    Args:
        tasks: All tasks.
        passes: The budget, see ``num_passes``.
        num_blocks: Blocks of the backbone.
        fixed: Tasks whose number is given.
        reads: As for ``num_passes``.
        drops: What the score of each task falls by without own blocks, above 0; 1 for a task without an entry.

    Returns:
        Own blocks by task; 0 for all tasks, except the fixed ones, if the budget allows none.
    """
    own_blocks = {task: fixed.get(task, 0) for task in tasks}
    open_tasks = [task for task in tasks if task not in fixed]
    while open_tasks:
        neediest = max(open_tasks, key=lambda task: drops.get(task, 1.0) / (1 + own_blocks[task]))
        more = {**own_blocks, neediest: own_blocks[neediest] + 1}
        costs = num_passes(more, num_blocks=num_blocks, reads=reads)
        if own_blocks[neediest] < num_blocks and costs <= passes + 1e-9:
            own_blocks = more
        else:
            open_tasks.remove(neediest)
    return own_blocks
