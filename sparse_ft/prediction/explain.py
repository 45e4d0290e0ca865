"""Show what the answers to one text cost: the plan of a call as a tree over the blocks."""

from collections.abc import Mapping, Sequence

from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.spec import TaskSpec


def explain(model: SparseExpertModel, specs: Mapping[str, TaskSpec], names: Sequence[str]) -> str:
    """Return the passes of the answers to one text, and for each stretch of blocks the tasks that share a row."""
    plan = model.plan({name: specs[name].reads for name in names})
    ends = [*(stretch.first_block for stretch in plan.stretches[1:]), plan.num_blocks]
    lines, rows = [], plan.leaves
    for stretch, end in zip(reversed(plan.stretches), reversed(ends), strict=True):
        groups = [
            ", ".join(name for name, row in zip(names, rows, strict=True) if row == number)
            for number in range(len(stretch.rows))
        ]
        first, last = stretch.first_block, end - 1
        blocks = f"block {last}" if first == last else f"blocks {first}-{last}"
        lines.append(f"  {blocks:<13} {' | '.join(groups)}")
        rows = [stretch.parents[row] for row in rows] if stretch.parents else rows
    noun = "task" if len(names) == 1 else "tasks"
    title = f"{len(names)} {noun}, one text: {plan.passes:.2f} passes through the backbone's {plan.num_blocks} blocks"
    return "\n".join([title, *reversed(lines)])
