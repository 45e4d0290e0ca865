"""The model: a frozen backbone, experts on its linears, and one head per task.

Shapes: N rows, S tokens a row, H hidden size, E experts of the model.
"""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.batching import Batch, TaskRows
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.pooling import pool
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.gate_checks import check_text_gate
from sparse_ft.experts.gates import Gate, GateInput, SequenceGate, TokenGate
from sparse_ft.experts.heads import Head, TaskSlot, common_expert
from sparse_ft.experts.named_experts import Experts
from sparse_ft.experts.plan import Plan, plan_batch, plan_tasks, planned_pass
from sparse_ft.experts.routing import ForwardPass, Routing, RoutingSlot


class SparseExpertModel(nn.Module):
    """One frozen backbone that answers every task through the task's expert and head.

    Args:
        backbone: Loaded by ``load_backbone``; the model replaces its linears in place and takes possession of it.
        pooling: ``unit``, ``mean``, ``first`` or ``last``, see ``pooling.pool``; ``auto`` is ``last`` for causal
            backbones, else ``unit``.
        by_words: Whether single texts are split into words before they become tokens, as in token classification.
    """

    def __init__(self, backbone: Backbone, *, pooling: str = "auto", by_words: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = backbone.model
        self.slot = RoutingSlot()
        self.slot.listen(backbone.blocks)
        self.experts = Experts(
            backbone.model,
            backbone.linears,
            block_of=backbone.block_of,
            hidden_size=backbone.hidden_size,
            slot=self.slot,
        )
        self.word_shapes = self.experts.word_shapes  # registers its tables
        self.pooling = pooling if pooling != "auto" else ("last" if backbone.family.causal else "unit")
        self.by_words = by_words
        self.heads = nn.ModuleDict()
        self.tasks: dict[str, TaskSlot] = {}
        self.backbone_dropout = False
        self.gate: SequenceGate | TokenGate | None = None

    @property
    def first_block(self) -> int:
        """The lowest block with an expert layer; all tasks share the blocks below."""
        return min((self.backbone.block_of(name) for name in self.experts.layers), default=self.backbone.num_blocks)

    @property
    def trunk_expert(self) -> str | None:
        """The expert that tasks share below experts of their own; None if what they share is the bare backbone."""
        return common_expert(list(self.tasks.values()))

    @property
    def parting_block(self) -> int:
        """The lowest block that an own expert of a task on the trunk changes, 0-based; the last one if none does."""
        lowest, last = self.first_block, self.backbone.num_blocks - 1
        if self.trunk_expert is not None:
            own = {name for slot in self.tasks.values() if slot.shared == self.trunk_expert for name in slot.experts}
            lowest = self.experts.lowest_block(own, default=last)
        return min(lowest, last)

    def on_trunk(self, task: str) -> bool:
        """Whether the states of a task below ``parting_block`` are those of the trunk."""
        slot = self.tasks[task]
        return slot.shared == self.trunk_expert or (slot.joint and self.trunk_expert is None)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.encoder.parameters()).device

    @property
    def routed(self) -> list[str]:
        """The experts that a gate may choose: all but the shared ones, which rows use in any case."""
        shared = {slot.shared for slot in self.tasks.values()}
        return [name for name in self.experts.names if name not in shared]

    @property
    def token_gate(self) -> TokenGate | None:
        """The model's gate if it decides at every block."""
        return self.gate if self.gate is not None and self.gate.every_block else None

    @property
    def sequence_gate(self) -> SequenceGate | None:
        """The model's gate if it decides once a text."""
        return None if self.gate is None or self.gate.every_block else self.gate

    def text_encoder(self, max_length: int) -> Encoder:
        """Return a new encoder of texts for this model; see ``Encoder``."""
        return Encoder(self.backbone, max_length=max_length, by_words=self.by_words)

    def add_task(
        self,
        name: str,
        *,
        expert: str | Sequence[str],
        level: str,
        num_outputs: int,
        joint: bool = False,
        shared: str | None = None,
    ) -> Head:
        """Add a head for a task that one of the experts serves, or several, and return it; see ``TaskSlot``."""
        slot = TaskSlot((expert,) if isinstance(expert, str) else tuple(expert), level, joint, shared)
        for used in slot.used:
            self.experts.index(used)
        head = Head(self.backbone.hidden_size, num_outputs, slot=self.slot).to(self.device)
        self.heads[_head_key(name)] = head
        self.tasks[name] = slot
        return head

    def head(self, task: str) -> Head:
        """Return the head of a task.

        Raises:
            ConfigError: If the model has no such task.
        """
        if task not in self.tasks:
            raise ConfigError(unknown_name("task in this model", task, self.tasks))
        head = self.heads[_head_key(task)]
        assert isinstance(head, Head)
        return head

    def remove_task(self, name: str) -> None:
        """Remove a task with its head."""
        self.head(name)  # refuses an unknown one
        del self.heads[_head_key(name)], self.tasks[name]

    def text_gate(self) -> SequenceGate:
        """Return the gate that chooses an expert for a text of no known task.

        Raises:
            ConfigError: If there is none, or the experts are not those that it was fitted on.
        """
        return check_text_gate(self.gate, self.routed, joint=any(slot.joint for slot in self.tasks.values()))

    def reindexed(self, routing: Routing, names: Sequence[str]) -> Routing:
        """Return a routing among a gate's experts ``names`` as one among all experts of the model.

        A gate may name experts that were removed since; it gives them no weight.
        """
        indices = [self.experts.index(name) if name in self.experts.names else 0 for name in names]
        return routing.reindexed(indices, num_experts=len(self.experts.names))

    def gated_blocks(self, gate: Gate) -> list[int]:
        """Return the 0-based blocks at which a gate decides: those with experts that the gate was made for."""
        return [block for block in range(self.first_block, self.backbone.num_blocks) if block in gate.blocks]

    def train(self, mode: bool = True) -> "SparseExpertModel":
        """Switch experts and heads to training, and the backbone's dropout only if ``backbone_dropout`` is set."""
        super().train(mode)
        self.encoder.train(mode and self.backbone_dropout)
        for layer in self.experts.layers.values():
            layer.train(mode)
        return self

    def forward(
        self,
        batch: Batch,
        *,
        routing: Routing | None = None,
        gate: Gate | None = None,
        block_routings: dict[int, Routing] | None = None,
        generator: torch.Generator | None = None,
        planned: bool | None = None,
    ) -> dict[str, Tensor]:
        """Answer every task of a batch.

        Args:
            batch: Rows of one or several tasks.
            routing: Experts of the rows; None routes each row to the expert of its task, or lets the model's own gate
                decide at every block if the tasks were trained so.
            gate: Decides at every block with experts, instead of ``routing``.
            block_routings: Filled with the gate's routing in each block.
            generator: Source of dropout's random numbers on experts and heads; None takes the global one.
            planned: Whether rows share the blocks that they have in common, see plan.py; None: outside training.

        Returns:
            Logits per task in float32, (rows, labels), or (words, tags) for tasks that read words.
        """
        hidden = self.hidden_states(
            batch, routing=routing, gate=gate, block_routings=block_routings, generator=generator, planned=planned
        )
        with self.slot.filled(ForwardPass(None, generator=generator)):  # for the dropout of the heads
            return {rows.task: self._head_logits(rows, hidden, batch) for rows in batch.tasks}

    def hidden_states(
        self,
        batch: Batch,
        *,
        routing: Routing | None = None,
        gate: Gate | None = None,
        block_routings: dict[int, Routing] | None = None,
        generator: torch.Generator | None = None,
        planned: bool | None = None,
    ) -> Tensor:
        """Run a batch through backbone and experts, [N, S, H]; the arguments are those of ``forward``."""
        if routing is None and gate is None:
            routing, gate = self._default_routing(batch)
        shared = self._shared_expert(batch)
        if gate is not None:  # it replaces this routing before the first expert layer
            routing = Routing(None, torch.zeros(len(batch.input_ids), len(self.experts.names), device=self.device))
        assert routing is not None
        serving = _with_shared(routing, shared, slice(None))
        if gate is None:
            routing = serving
        plan, whole = None, self.backbone.family.routes_rows
        if planned is None:
            planned = not (torch.is_grad_enabled() or self.training)
        if whole and planned:
            plan = plan_batch(batch, serving, self.experts, num_blocks=self.backbone.num_blocks, gated=gate is not None)
        # Some layers of other families see more than one entry a row: one expert a pass, or one row.
        whole = whole or (gate is None and routing.only is not None)
        segments = [slice(None)] if whole else routing.segments(single_rows=gate is not None)
        passes = [ForwardPass(routing.take(rows), rows) for rows in segments]
        parts, decided = [], dict[int, Routing]()
        for running in passes if plan is None else [planned_pass(plan, routing)]:
            running.generator = generator
            if gate is not None:
                decide = functools.partial(self._decide, gate, running, batch, shared, decided)
                running.changes = {block: [functools.partial(decide, block)] for block in self.gated_blocks(gate)}
            parts.append(self._run(batch, running))
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        if block_routings is not None:
            block_routings.update(
                decided if plan is None else {b: each.take(plan.leaves) for b, each in decided.items()}
            )
        return hidden if plan is None else hidden[plan.leaves]

    def plan(self, reads: Mapping[str, Hashable]) -> Plan:
        """Return the plan of the answers of tasks to one short text, each by the task's own experts.

        Args:
            reads: Task to what it reads of a text; tasks that read different inputs share nothing.
        """
        mixed = [] if self.gate is None else [name for name in self.gate.names if name in self.experts.names]
        slots = [self.tasks[name] for name in reads]
        used = [[*slot.used, *(mixed if slot.joint else [])] for slot in slots]
        shaped = [slot.level == "word" or self.by_words for slot in slots]
        inputs = list(reads.values() if self.backbone.family.routes_rows else reads)  # else an expert at a time
        return plan_tasks(inputs, used, shaped, self.experts, num_blocks=self.backbone.num_blocks)

    def states_by(self, expert: str | None, batch: Batch) -> Tensor:
        """Run a batch of texts through the backbone with one expert, or bare, [N, S, H]; refuses an unknown expert."""
        if expert is None:
            return self._run(batch, ForwardPass(None))
        indices = [self.experts.index(expert)] * len(batch.input_ids)
        return self._run(batch, ForwardPass(Routing.one_hot(indices, device=self.device)))

    def _default_routing(self, batch: Batch) -> tuple[Routing | None, TokenGate | None]:
        """Route each row to the expert of its task, or all rows by the token gate of joint tasks."""
        slots = {rows.task: self.tasks[rows.task] for rows in batch.tasks}
        gated = [task for task, slot in slots.items() if slot.gated]
        if not gated:
            experts: list[int] = []
            for rows in batch.tasks:
                experts += [self.experts.index(slots[rows.task].experts[0])] * (rows.stop - rows.start)
            return Routing.one_hot(experts, device=self.device), None
        if self.token_gate is None or len(gated) < len(slots):
            raise ValueError(f"The rows of task {gated[0]!r} must be routed first; see prediction.routes.Route.")
        return None, self.token_gate

    def _shared_expert(self, batch: Batch) -> tuple[int, Tensor] | None:
        """Return the shared expert of the batch's tasks, and [N], 1 for rows that use it; None if no row does."""
        names = [self.tasks[each.task].shared for each in batch.tasks]
        used = sorted({name for name in names if name is not None})
        if not used:
            return None
        if len(used) > 1:
            raise ValueError(f"The tasks of one batch use several shared experts: {', '.join(used)}.")
        uses = torch.zeros(len(batch.input_ids), device=self.device)
        for name, each in zip(names, batch.tasks, strict=True):
            uses[each.start : each.stop] = float(name is not None)
        return self.experts.index(used[0]), uses

    def _decide(
        self,
        gate: Gate,
        running: ForwardPass,
        batch: Batch,
        shared: tuple[int, Tensor] | None,
        decided: dict[int, Routing],
        block: int,
        hidden: Tensor,
    ) -> Tensor:
        """Let a gate replace the routing of a pass at one block; the hidden states [U, S, H] stay as they are."""
        inputs = GateInput(hidden, batch.attention_mask[running.rows], block, generator=running.generator)
        routing = self.reindexed(gate.route(inputs), gate.names)
        decided[block] = routing
        running.routing = _with_shared(routing, shared, running.rows)
        return hidden

    def _run(self, batch: Batch, running: ForwardPass) -> Tensor:
        """Run the rows of a pass through the backbone, [U, S, H]."""
        rows = running.rows
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[rows], "attention_mask": batch.attention_mask[rows]}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        if self.backbone.family.causal:
            inputs["use_cache"] = False
        if batch.word_shapes is not None and running.routing is not None:
            for block, experts in self.word_shapes.blocks_of(running.present).items():
                add = functools.partial(self._add_word_shapes, running, shapes=batch.word_shapes, experts=experts)
                running.changes.setdefault(block, []).append(add)
        if batch.trunk is not None:
            running.trunk, running.first_block = batch.trunk[rows], self.parting_block
        with self.slot.filled(running):
            return self.encoder(**inputs).last_hidden_state

    def _add_word_shapes(
        self, running: ForwardPass, hidden: Tensor, *, shapes: Tensor, experts: Sequence[int]
    ) -> Tensor:
        assert running.routing is not None
        return self.word_shapes.added(hidden, shapes[running.rows], routing=running.routing, experts=experts)

    def _head_logits(self, rows: TaskRows, hidden: Tensor, batch: Batch) -> Tensor:
        """Apply a task's head to its rows: [rows, labels], or [words, tags]."""
        head = self.head(rows.task)
        if self.tasks[rows.task].level == "word":
            if rows.words is None:  # a batch of texts without a single word
                return head(hidden.new_zeros(0, hidden.shape[-1]))
            in_rows, in_tokens = rows.words
            return head(hidden[in_rows, in_tokens])
        selected = slice(rows.start, rows.stop)
        return head(pool(hidden[selected], batch.attention_mask[selected], self.pooling))


def _with_shared(routing: Routing, shared: tuple[int, Tensor] | None, rows: slice | Tensor) -> Routing:
    """Add the shared expert of a batch to the routing of some rows, for those that use it."""
    return routing if shared is None else routing.with_expert(shared[0], shared[1][rows])


def _head_key(task: str) -> str:
    """Name a head's module so that no task name collides with an attribute of ``nn.ModuleDict``."""
    return f"task_{task}"
