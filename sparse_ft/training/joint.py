"""How rows are routed in training where their task alone does not determine their expert."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_ft.backbone.batching import Batch
from sparse_ft.backbone.encoding import Example
from sparse_ft.config import RunConfig
from sparse_ft.experts.inference import gate_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.routes import Route
from sparse_ft.training.gate_losses import AuxiliaryLosses, auxiliary_losses

SHARED = "shared"
"""Name of the expert that all tasks of a run share, if the run has one."""

Rows = Sequence[tuple[str, int]]
"""Task and index of each row of a batch; the rows of a task are adjacent."""


class JointRouting:
    """Routes rows through the gate that a joint run trains, and computes the gate's auxiliary losses.

    Args:
        model: With its gate.
        examples: Training rows by task.
        run: The run's config.
    """

    def __init__(self, model: SparseExpertModel, examples: Mapping[str, Sequence[Example]], *, run: RunConfig) -> None:
        gate = model.gate
        assert gate is not None
        self.gate, self.settings, self.names = gate, run.gate, gate.names
        self.experts = [model.experts.index(name) for name in gate.names]
        self.partition = None if gate.every_block else gate.partition
        self.targets = {task: self._target(model, task) for task in examples}
        self.means: dict[str, Tensor] = {}
        if not gate.every_block:  # it reads the bare backbone, whose states never change
            self.means = {task: gate_states(model, gate, rows) for task, rows in examples.items()}

    def _target(self, model: SparseExpertModel, task: str) -> int:
        """Return the index of a task's expert, or of the expert's group; -100 for none."""
        experts = model.tasks[task].experts
        if len(experts) != 1 or experts[0] not in self.names:
            return -100
        index = self.names.index(experts[0])
        if self.partition is None:
            return index
        return self.partition.group_of[index]

    def forward(
        self, model: SparseExpertModel, batch: Batch, rows: Rows, *, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], AuxiliaryLosses]:
        """Compute logits by task, and the auxiliary losses.

        Args:
            model: In training mode.
            batch: The rows as tensors.
            rows: Task and index in ``examples`` of each row.
            generator: Source of dropout and jitter; None takes the global one.
        """
        gate = self.gate
        if gate.every_block:
            seen: dict[int, Routing] = {}
            logits = model(batch, gate=gate, block_routings=seen, generator=generator)
            routings, mask = list(seen.values()), batch.attention_mask
        else:
            means = torch.stack([self.means[task][index] for task, index in rows]).to(model.device)
            jittered = gate.selection.jittered(means, generator)
            decision = gate.decide(jittered, min_familiarity=0.0, mixes=True, training=True)
            routing = model.reindexed(decision, gate.names)
            logits = model(batch, routing=routing, generator=generator)
            routings, mask = [routing], None
        return logits, auxiliary_losses(
            routings,
            experts=self.experts,
            num_experts=len(model.experts.names),
            settings=self.settings,
            top_k=gate.selection.top_k,
            targets=torch.tensor([self.targets[task] for task, _ in rows], device=model.device),
            mask=mask,
            partition=self.partition,
        )


class FixedRouting:
    """Routes the rows of tasks that have several experts as a finished gate decides, once for the whole run.

    Args:
        model: With its gate.
        examples: Training rows by task.
    """

    def __init__(self, model: SparseExpertModel, examples: Mapping[str, Sequence[Example]]) -> None:
        self.weights = {task: self._weights(model, task, rows) for task, rows in examples.items()}

    def _weights(self, model: SparseExpertModel, task: str, rows: Sequence[Example]) -> Tensor:
        """Return the weight of every expert for each row, [rows, experts]."""
        return Route("task", model).rows(rows, task=task).dense_weights(len(model.experts.names)).cpu()

    def forward(
        self, model: SparseExpertModel, batch: Batch, rows: Rows, *, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], None]:
        """Compute logits by task; see ``JointRouting.forward``. There are no auxiliary losses."""
        weights = torch.stack([self.weights[task][index] for task, index in rows]).to(model.device)  # [N, E]
        top = weights.topk(int((weights > 0).sum(-1).max()), dim=-1)
        return model(batch, routing=Routing(top.indices, top.values), generator=generator), None


def pool_names(number: int) -> list[str]:
    """Name the experts of a pool."""
    return [f"pool-{index}" for index in range(number)]


def has_gate(run: RunConfig) -> bool:
    """Return whether a run trains a gate with its experts; a pool of one expert needs none."""
    return run.stage == "joint" and run.experts.pool != 1
