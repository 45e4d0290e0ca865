"""How many of the highest blocks each task has for itself where all tasks share one expert below, and what it costs."""

from collections.abc import Collection, Mapping, Sequence


def num_passes(own_blocks: Collection[int], *, num_blocks: int) -> float:
    """Return the passes through the backbone that the answers of all tasks to one text cost.

    A block runs once for each task that has it for itself, and once for all the others together.

    Args:
        own_blocks: Own blocks of each task, counted from the top.
        num_blocks: Blocks of the backbone.
    """
    rows = 0
    for above in range(num_blocks):  # blocks above this one
        own = sum(number > above for number in own_blocks)
        rows += own + (own < len(own_blocks))
    return rows / num_blocks


def choose_own_blocks(
    tasks: Sequence[str],
    *,
    passes: float,
    num_blocks: int,
    fixed: Mapping[str, int],
    drops: Mapping[str, float],
) -> dict[str, int]:
    """Give the tasks own blocks by d'Hondt's rule: the next block to the largest drop / (1 + blocks that it has).

    https://en.wikipedia.org/wiki/D%27Hondt_method, with drops for votes and blocks for seats.

    A block that does not fit the budget is not given, and its task gets no more.

    Args:
        tasks: All tasks.
        passes: The budget, see ``num_passes``.
        num_blocks: Blocks of the backbone.
        fixed: Tasks whose number is given.
        drops: What the score of each task falls by without own blocks, above 0; 1 for a task without an entry.

    Returns:
        Own blocks by task; 0 for all tasks, except the fixed ones, if the budget allows none.
    """
    own_blocks = {task: fixed.get(task, 0) for task in tasks}
    open_tasks = [task for task in tasks if task not in fixed]
    while open_tasks:
        neediest = max(open_tasks, key=lambda task: drops.get(task, 1.0) / (1 + own_blocks[task]))
        more = {**own_blocks, neediest: own_blocks[neediest] + 1}
        if (
            own_blocks[neediest] < num_blocks
            and num_passes(list(more.values()), num_blocks=num_blocks) <= passes + 1e-9
        ):
            own_blocks = more
        else:
            open_tasks.remove(neediest)
    return own_blocks
