"""The routing of a split: how often it was right, which experts it used and which it never chose."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_ft.evaluation.tables import text_table
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.routes import heaviest

UNKNOWN = "unknown"
"""In place of the expert of a row that has no weight."""


@dataclass(frozen=True)
class RoutingReport:
    """The routing of the rows of several tasks."""

    experts: list[str]
    confusion: dict[str, dict[str, int]]
    """Task to expert (or ``unknown``) to the number of rows in which it has the largest weight."""
    usage: dict[str, dict[str, float]]
    """Task to expert to its mean weight, above 0 and up to 1; without experts that were never chosen."""
    entropy: dict[str, float]
    """Task to the mean entropy in bits: of the probabilities that the gate gives, or of the weights if tokens were
    routed; 0 for routes without probabilities."""
    own: dict[str, tuple[str, ...]]
    """Task to the experts that its rows are meant for."""
    blocks: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Block to task to expert to its mean weight in that block; empty if texts were routed as a whole."""
    groups: list[list[str]] = field(default_factory=list)
    """Experts among which the gate does not choose, because their tasks are answered together. Rows of their tasks that
    reach the group count for the expert of the task; other rows count for the first expert."""

    @property
    def accuracy(self) -> float:
        """Share of all rows that went to an expert of their task, 0 to 1."""
        right = sum(self.right(task) for task in self.confusion)
        return right / max(1, sum(sum(counts.values()) for counts in self.confusion.values()))

    def right(self, task: str) -> int:
        """Return how many rows of a task went to one of its experts."""
        return sum(self.confusion[task].get(expert, 0) for expert in self.own[task])

    @property
    def dead(self) -> list[str]:
        """Experts that have the largest weight in no row, and whose group has none."""
        chosen = {expert for counts in self.confusion.values() for expert, number in counts.items() if number}
        return [expert for expert in self.experts if chosen.isdisjoint(self._group(expert))]

    def _group(self, expert: str) -> list[str]:
        return next((group for group in self.groups if expert in group), [expert])

    def to_dict(self) -> dict[str, Any]:
        """Return the ``routing`` of ``evaluate --json``; ``blocks`` only if tokens were routed, ``groups`` if any."""
        blocks = {str(block): usage for block, usage in self.blocks.items()}
        return {
            "accuracy": self.accuracy,
            "usage": self.usage,
            "entropy": self.entropy,
            "confusion": self.confusion,
            "dead": self.dead,
            **({"blocks": blocks} if blocks else {}),
            **({"groups": self.groups} if self.groups else {}),
        }

    def to_text(self) -> str:
        """Lay out the confusion of tasks and groups of experts as a table."""
        unknown = [[UNKNOWN]] if any(UNKNOWN in counts for counts in self.confusion.values()) else []
        columns = [*map(self._group, self.experts), *unknown]
        columns = [group for index, group in enumerate(columns) if group not in columns[:index]]
        wrong = any(set(self.experts) - set(own) for own in self.own.values())  # otherwise none can be
        accuracy = f", accuracy {self.accuracy:.4f}" if wrong else ""
        rows = []
        for task, counts in self.confusion.items():
            share = self.right(task) / max(1, sum(counts.values()))
            numbers = [str(sum(counts.get(expert, 0) for expert in group)) for group in columns]
            rows.append([task, *numbers, f"{share:.3f}", f"{self.entropy[task]:.3f}"])
        header = ["task", *("+".join(group) for group in columns), "right", "entropy"]
        table = text_table(header, rows, min_width=6)
        lines = [f"routing (rows of each task by the expert that the gate chose){accuracy}", "", *table]
        if self.dead:
            lines.append(f"Never chosen: {', '.join(self.dead)}")
        return "\n".join(lines) + "\n"


def report_routing(
    routings: Mapping[str, Routing],
    *,
    experts: Sequence[str],
    own: Mapping[str, tuple[str, ...]],
    shared: Collection[str] = (),
    usage: Mapping[str, Tensor] | None = None,
    blocks: Mapping[str, Sequence[int]] | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> RoutingReport:
    """Count the experts of each row.

    Args:
        routings: Task to the routing of its rows; one routing a row, not a token.
        experts: Names in the order of the model.
        own: Task to its experts.
        shared: Experts that rows use whatever the route; they are not reported.
        usage: Task to the mean weights [rows, blocks, experts] in each block, if tokens were routed.
        blocks: Task to the blocks of ``usage``.
        groups: Experts whose tasks are answered together.
    """
    confusion, shares, entropy = {}, {}, {}
    for task, routing in routings.items():
        confusion[task] = dict(Counter(expert or UNKNOWN for expert in heaviest(routing, experts)))
        shares[task] = _above_zero(experts, routing.dense_weights(len(experts)).mean(0))
        if usage is not None and task in usage:
            entropy[task] = _entropy(usage[task])
        else:
            entropy[task] = 0.0 if routing.logits is None else _entropy(routing.logits.softmax(-1))
    by_block: dict[int, dict[str, dict[str, float]]] = {}
    for task, weights in (usage or {}).items():
        for block, mean in zip((blocks or {})[task], weights.mean(0), strict=True):
            by_block.setdefault(block, {})[task] = _above_zero(experts, mean)
    chosen = [expert for expert in experts if expert not in shared]
    return RoutingReport(chosen, confusion, shares, entropy, dict(own), by_block, [list(group) for group in groups])


def _above_zero(experts: Sequence[str], weights: Tensor) -> dict[str, float]:
    """Name the weights [experts] that are above 0."""
    return {expert: weight for expert, weight in zip(experts, weights.tolist(), strict=True) if weight > 0}


def _entropy(shares: Tensor) -> float:
    """Return the mean entropy of shares [..., experts] in bits."""
    return float(torch.special.entr(shares).sum(-1).mean()) / math.log(2) if len(shares) else 0.0
