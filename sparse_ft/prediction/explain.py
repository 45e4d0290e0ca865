"""Show what the answers to one text cost: the plan of a call as a tree over the blocks."""

from collections.abc import Hashable, Mapping, Sequence

import torch

from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.plan import Plan, expert_paths, plan_rows
from sparse_ft.experts.routing import Routing
from sparse_ft.tasks.spec import TaskSpec


def plan_tasks(model: SparseExpertModel, specs: Mapping[str, TaskSpec], names: Sequence[str]) -> Plan:
    """Return the plan of the answers of some tasks to one short text, each by the task's own experts.

    Args:
        model: The model that answers.
        specs: All its task files; tasks on single texts, pairs and choices read different inputs.
        names: The tasks.
    """
    num_blocks = model.backbone.num_blocks
    slots = [model.tasks[name] for name in names]
    weights = torch.zeros(len(names), len(model.experts.names))
    for row, slot in enumerate(slots):
        mixed = [name for name in model.gate.names if name in model.experts.names] if slot.joint and model.gate else []
        weights[row, [model.experts.index(name) for name in (*slot.used, *mixed)]] = 1.0
    shapes = [(1,) if slot.level == "word" or model.by_words else () for slot in slots]
    paths = expert_paths(Routing(None, weights), shapes, model.experts, num_blocks=num_blocks)
    inputs: list[Hashable] = [specs[name].reads for name in names]
    if not model.backbone.family.routes_rows:
        inputs = list(names)  # an expert at a time
    return plan_rows(inputs, paths, num_blocks=num_blocks)


def explain(model: SparseExpertModel, specs: Mapping[str, TaskSpec], names: Sequence[str]) -> str:
    """Return the passes of the answers to one text, and for each stretch of blocks the tasks that share a row."""
    plan = plan_tasks(model, specs, names)
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
    passes, noun = plan.row_blocks / plan.num_blocks, "task" if len(names) == 1 else "tasks"
    title = f"{len(names)} {noun}, one text: {passes:.2f} passes through the backbone's {plan.num_blocks} blocks"
    return "\n".join([title, *reversed(lines)])
