"""How a gate routes the rows of a run in training, and how it is taught while it mixes the experts of a joint run."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_ft.backbone.batching import Batch
from sparse_ft.backbone.encoding import Example
from sparse_ft.config import GateConfig, RunConfig
from sparse_ft.experts.gates import SequenceGate, TokenGate
from sparse_ft.experts.inference import mean_states, text_routing
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection
from sparse_ft.training.gate_losses import Auxiliary, auxiliary

Pairs = Sequence[tuple[str, int]]
"""Task and place of each row of a batch, the rows of a task adjacent: a unit of ``TrainingTask.units`` until it is
computed, then each of its examples."""


class Mixing:
    """Routes the rows of a joint run through the gate in training, and computes what the gate is taught by.

    Args:
        model: With its gate.
        examples: Training rows by task.
        run: The run's config.
    """

    def __init__(self, model: SparseExpertModel, examples: Mapping[str, Sequence[Example]], *, run: RunConfig) -> None:
        gate = model.gate
        assert gate is not None
        self.gate, self.settings = gate, run.gate
        self.names = gate.names
        self.places = [model.experts.index(name) for name in gate.names]
        self.targets = {task: self._target(model, task) for task in examples}
        self.means: dict[str, Tensor] = {}
        if isinstance(gate, SequenceGate):  # what it reads is that of the bare backbone, so it never changes
            self.means = {task: mean_states(model, rows, block=gate.block) for task, rows in examples.items()}

    def _target(self, model: SparseExpertModel, task: str) -> int:
        experts = model.tasks[task].experts
        return self.names.index(experts[0]) if len(experts) == 1 and experts[0] in self.names else -100

    def run(
        self, model: SparseExpertModel, batch: Batch, pairs: Pairs, *, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], Auxiliary]:
        """Answer some rows of a batch.

        Args:
            model: In training mode.
            batch: The rows.
            pairs: The same rows by task and number.
            generator: Of everything random.

        Returns:
            Logits per task, and what the gate did.
        """
        gate = self.gate
        if isinstance(gate, TokenGate):
            seen: dict[int, Routing] = {}
            logits = model(batch, gate=gate, seen=seen, generator=generator)
            routings, mask = list(seen.values()), batch.attention_mask
        else:
            read = torch.stack([self.means[task][row] for task, row in pairs]).to(model.device)
            chosen = gate.decide(gate.selection.jittered(read, generator), abstains=False, training=True)
            routing = model.reindexed(chosen)
            logits = model(batch, routing=routing, generator=generator)
            routings, mask = [routing], None
        targets = torch.tensor([self.targets[task] for task, _ in pairs], device=model.device)
        told = auxiliary(
            routings,
            places=self.places,
            num_experts=len(model.experts.names),
            settings=self.settings,
            top_k=gate.selection.top_k,
            targets=targets,
            mask=mask,
        )
        return logits, told


class Domains:
    """Routes the rows of tasks with several experts as the gate says, once and for all, while the experts train.

    Args:
        model: With its gate.
        examples: Training rows by task.
    """

    def __init__(self, model: SparseExpertModel, examples: Mapping[str, Sequence[Example]]) -> None:
        self.routings = {task: self._routing(model, task, rows) for task, rows in examples.items()}

    def _routing(self, model: SparseExpertModel, task: str, rows: Sequence[Example]) -> Tensor:
        """Return the weight of every expert for each row, [rows, experts]."""
        slot, number = model.tasks[task], len(model.experts.names)
        if slot.gated:
            return text_routing(model, rows, task=task).dense_weights(number).cpu()
        return Routing.one_hot([model.experts.index(slot.experts[0])] * len(rows)).dense_weights(number)

    def run(
        self, model: SparseExpertModel, batch: Batch, pairs: Pairs, *, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], None]:
        """Answer some rows of a batch; see ``Mixing.run``, but nothing is taught to the gate."""
        weights = torch.stack([self.routings[task][row] for task, row in pairs]).to(model.device)  # [N, E]
        chosen = weights.topk(int((weights > 0).sum(-1).max()), dim=-1)
        routing = Routing(chosen.indices, chosen.values)
        return model(batch, routing=routing, generator=generator), None


SHARED = "shared"
"""Name of the expert that every row of a joint run uses, if it has one."""


def pool_names(number: int) -> list[str]:
    """Name the experts of a pool."""
    return [f"pool-{place}" for place in range(number)]


def joint_selection(settings: GateConfig) -> Selection:
    """Return how the gate of a joint run chooses: two experts by default, and Switch's weights for one."""
    top_k = settings.top_k or 2
    return Selection(
        top_k=top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        normalise=top_k > 1,
        min_confidence=settings.min_confidence,
        jitter=settings.jitter,
        capacity=settings.capacity,
    )


def has_gate(run: RunConfig) -> bool:
    """Whether a run trains a gate with its experts; a pool of one is an expert that all tasks share."""
    return run.stage == "joint" and run.experts.pool != 1
