"""How many numbers a checkpoint was trained to."""

from collections.abc import Sequence

from sparse_ft.experts.model import SparseExpertModel


def trained_numbers(model: SparseExpertModel, tasks: Sequence[str] | None = None, *, gate: bool = False) -> int:
    """Count those of the experts and heads of tasks, by default of all, and those of the gate if it was asked."""
    names = list(model.tasks if tasks is None else tasks)
    experts = dict.fromkeys(expert for name in names for expert in model.tasks[name].used)
    parts = [value for expert in experts for value in model.experts.parameters(expert).values()]
    parts += [value for name in names for value in model.head(name).parameters()]
    parts += model.gate.parameters() if gate and model.gate is not None else []
    return sum(part.numel() for part in parts)
