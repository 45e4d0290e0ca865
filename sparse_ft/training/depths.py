"""How many of the highest blocks each task has for itself where all tasks share one expert below, and what it costs."""

from collections.abc import Collection, Mapping, Sequence


def num_passes(depths: Collection[int], *, num_blocks: int) -> float:
    """Return the passes through the backbone that the answers of all tasks to one text cost.

    A block runs once for each task that has it for itself, and once for all the others together.

    Args:
        depths: Own blocks of each task, counted from the top.
        num_blocks: Blocks of the backbone.
    """
    rows = 0
    for above in range(num_blocks):  # blocks above this one
        own = sum(depth > above for depth in depths)
        rows += own + (own < len(depths))
    return rows / num_blocks


def choose_depths(
    tasks: Sequence[str],
    *,
    passes: float,
    num_blocks: int,
    fixed: Mapping[str, int],
    losses: Mapping[str, float],
) -> dict[str, int]:
    """Give the tasks own blocks by d'Hondt's rule: the next block to the largest loss / (1 + blocks that it has).

    A block that does not fit the budget is not given, and its task gets no more.

    Args:
        tasks: All tasks.
        passes: The budget, see ``num_passes``.
        num_blocks: Blocks of the backbone.
        fixed: Tasks whose number is given.
        losses: What each task loses without own blocks, above 0; a task without an entry loses 1.

    Returns:
        Own blocks by task; 0 for all tasks, except the fixed ones, if the budget allows none.
    """
    depths = {task: fixed.get(task, 0) for task in tasks}
    open_tasks = [task for task in tasks if task not in fixed]
    while open_tasks:
        neediest = max(open_tasks, key=lambda task: losses.get(task, 1.0) / (1 + depths[task]))
        more = {**depths, neediest: depths[neediest] + 1}
        if depths[neediest] < num_blocks and num_passes(list(more.values()), num_blocks=num_blocks) <= passes + 1e-9:
            depths = more
        else:
            open_tasks.remove(neediest)
    return depths
