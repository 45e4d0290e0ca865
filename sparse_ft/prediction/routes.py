"""Who serves a row: one ``Route`` decides for predict, evaluate, inspect and training alike."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Example
from sparse_ft.errors import CheckpointError, ConfigError, unknown_name
from sparse_ft.experts.gates import Gate
from sparse_ft.experts.inference import gate_states, stacked_means
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.arrow import arrow_gate
from sparse_ft.prediction.baselines import (
    BernoulliChooser,
    HashChooser,
    LoadAwareChooser,
    RandomChooser,
    RoundRobinChooser,
    UniformChooser,
)
from sparse_ft.prediction.requests import Metadata
from sparse_ft.prediction.rules import Rules, load_rules

_LOG = logging.getLogger("sparse_ft")

_LIKELY = 0.1
"""Probability from which a task is answered besides the most probable one where both share a pass."""


class TextChooser(Protocol):
    """Chooses among the experts of a model by texts and their metadata, before the model runs."""

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Choose experts for each text, on the CPU; a text whose weights are all 0 is unknown."""
        ...


BASELINES: dict[str, Callable[[int, int], TextChooser]] = {
    "uniform": lambda num_experts, seed: UniformChooser(num_experts),
    "random": lambda num_experts, seed: RandomChooser(num_experts, seed=seed),
    "round_robin": lambda num_experts, seed: RoundRobinChooser(num_experts),
    "hash": lambda num_experts, seed: HashChooser(num_experts),
    "load_aware": lambda num_experts, seed: LoadAwareChooser(num_experts, seed=seed),
    "bernoulli": lambda num_experts, seed: BernoulliChooser(num_experts, seed=seed),
}
ROUTES = ("task", "gate", "arrow", *BASELINES)


@dataclass(frozen=True)
class Route:
    """Decides which experts serve a row, with which weights.

    One of five decides: the task of the row (``task``: its expert, or the model's gate if the task has several experts
    or was trained jointly), the model's gate (``gate``), one expert for all rows, a ``chooser`` that reads texts (rules
    and baselines), or an ``arrow`` gate. The decision comes in one of two forms. A gate that decides at every block
    runs inside the model, and ``block_gate`` hands it over; every other decision is a ``Routing``, which ``rows`` makes
    before the model runs. A row whose weights are all 0 is unknown; ``heaviest`` names the expert of each other row.

    Build one with ``find_route``.
    """

    name: str
    model: SparseExpertModel
    expert: str | None = None
    chooser: TextChooser | None = None
    arrow: Gate | None = None
    min_familiarity: float | None = None
    """Least familiarity of a text that the route ``gate`` answers, 0 to 1; None takes that of the checkpoint."""

    @property
    def once_a_text(self) -> bool:
        """Whether a text is routed by one row of model input, even if its task reads it in several rows."""
        return self.name == "gate"

    def block_gate(self, task: str | None = None) -> Gate | None:
        """Return the gate that decides at every block for the rows of a task; None if ``rows`` decides."""
        uses_gate = self.name == "gate" or (self.name == "task" and task is not None and self.model.tasks[task].gated)
        return self.model.token_gate if uses_gate else self.arrow

    @torch.no_grad()
    def rows(
        self,
        examples: Sequence[Example],
        *,
        task: str | None = None,
        among: Collection[str] | None = None,
        texts: Sequence[str] = (),
        metadata: Sequence[Metadata] = (),
        title: str | None = None,
    ) -> Routing:
        """Route examples before the model runs; the model is in evaluation mode.

        Args:
            examples: Rows of model input.
            task: Their task, which only the route ``task`` reads.
            among: Experts that the route ``gate`` may choose; None allows all.
            texts: Texts that the ``row`` of an example indexes, for a chooser.
            metadata: Metadata of the texts, for a chooser; empty if there is none.
            title: Of a progress bar while a gate reads the examples; None shows none.

        Raises:
            ConfigError: If a gate has to decide and the model has none that fits.
            CheckpointError: If its weights are not finite.
        """
        if self.chooser is not None:
            indices = [example.row for example in examples]
            return self.choose([texts[row] for row in indices], [metadata[row] for row in indices] if metadata else ())
        if self.name == "gate":
            return self._by_gate(examples, among=among, title=title)
        expert = self.expert
        if expert is None:
            assert task is not None, "The route 'task' needs the task of the rows."
            slot = self.model.tasks[task]
            if slot.gated:
                return self._by_gate(examples, task=task, among=None if slot.joint else slot.experts, title=title)
            (expert,) = slot.experts
        return Routing.one_hot([self.model.experts.index(expert)] * len(examples), device=self.model.device)

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Let the chooser decide for texts."""
        assert self.chooser is not None
        model = self.model
        indices = [model.experts.index(name) for name in model.routed]
        routing = self.chooser.choose(texts, metadata).reindexed(indices, num_experts=len(model.experts.names))
        experts = None if routing.experts is None else routing.experts.to(model.device)
        return replace(routing, experts=experts, weights=routing.weights.to(model.device))

    def _by_gate(
        self,
        examples: Sequence[Example],
        *,
        task: str | None = None,
        among: Collection[str] | None = None,
        title: str | None = None,
    ) -> Routing:
        """Let the model's gate decide from the means that the examples carry, or else compute the means."""
        model = self.model
        gate, mixes = model.sequence_gate, any(slot.joint for slot in model.tasks.values())
        if task is None:
            gate = model.text_gate()
        if gate is None:
            raise ConfigError(f"Task {task!r} needs a gate that chooses among its experts, and this model has none.")
        carried = bool(examples) and all(example.means is not None for example in examples)
        means = stacked_means(examples) if carried else gate_states(model, gate, examples, title=title)
        tokens = [example.input_ids for example in examples] if task is None else None  # a known task is never unknown
        excluded = [] if among is None else [index for index, name in enumerate(gate.names) if name not in among]
        threshold = self.min_familiarity if task is None else 0.0
        decision = gate.decide(
            means.to(model.device), tokens, excluded=excluded, min_familiarity=threshold, mixes=mixes
        )
        if any(bool(numbers.isnan().any()) for numbers in (decision.weights, decision.logits) if numbers is not None):
            raise CheckpointError(
                f"The gate gives weights that are NaN to the experts {', '.join(map(repr, gate.names))}. Expected "
                "finite numbers: its tensors or its temperature are damaged. Restore the checkpoint from a copy, or "
                "fit the gate again (train --from CHECKPOINT --stage gate)."
            )
        return model.reindexed(decision, gate.names if mixes else gate.leads)

    def serving(self, routing: Routing, task: str, *, likely: bool = True) -> Routing:
        """Return a routing of texts as the routing for one of the tasks that are answered.

        Where the gate has chosen a group, its first expert stands for the group; the task's expert takes its place. The
        same holds where the task is answered in addition, see ``answering``.

        Args:
            routing: As ``rows`` returns it.
            task: The task.
            likely: Whether it takes its place also where it is answered in addition.
        """
        slot, gate = self.model.tasks[task], self.model.sequence_gate
        if self.name != "gate" or gate is None or routing.experts is None or slot.gated:
            return routing
        (expert,) = slot.experts
        lead, own = (self.model.experts.index(name) for name in (gate.companions(expert)[0], expert))
        served = routing.experts == lead  # [N, K]
        groups = self._likely_groups(routing) if likely else None
        if groups is not None:
            served |= groups[:, gate.partition.group_of[gate.names.index(expert)]].unsqueeze(1)
        return replace(routing, experts=routing.experts.where(~served, own))

    def _likely_groups(self, routing: Routing) -> Tensor | None:
        """Return which groups have a probability of at least ``_LIKELY``, [N, G] bool; None without a shared expert.

        Where tasks share a pass, one more task costs a part of a pass only, so every likely task is answered.
        """
        gate = self.model.sequence_gate
        if gate is None or gate.trunk_expert is None or routing.logits is None or routing.weights.shape[-1] > 1:
            return None
        if any(slot.gated for slot in self.model.tasks.values()):  # it would have to choose among their experts, too
            return None
        known = routing.weights.sum(-1, keepdim=True) > 0
        return (gate.partition.logits(routing.logits).softmax(-1) >= _LIKELY) & known

    def answering(self, routing: Routing) -> list[list[str]]:
        """Return the experts whose tasks are answered for each text: none if it is unknown, else those of one group.

        Where the gate reads the states of a shared expert, those of every likely group.
        """
        if self.name != "gate":
            return [[] if name is None else [name] for name in heaviest(routing, self.model.experts.names)]
        gate, weights = self.model.text_gate(), routing.dense_weights(len(self.model.experts.names))
        of_gate = weights[:, [self.model.experts.index(name) for name in gate.names]]  # [N, gate's experts]
        sums = torch.stack([of_gate[:, list(members)].sum(-1) for members in gate.partition.members], -1)  # [N, groups]
        chosen = (sums == sums.amax(-1, keepdim=True)) & (sums > 0)
        chosen = chosen.long().cumsum(-1).eq(1) & chosen  # the first of equal ones
        likely = self._likely_groups(routing)
        answered = (chosen if likely is None else chosen | likely).tolist()
        members = [[gate.names[index] for index in group] for group in gate.partition.members]
        return [
            [name for group, named in zip(members, row, strict=True) if named for name in group] for row in answered
        ]

    def warnings(self) -> list[str]:
        """Name the rules that matched no text so far."""
        if not isinstance(self.chooser, Rules):
            return []
        return [f"Rule {number} of {self.name} never matched." for number in self.chooser.unmatched()]


def find_route(name: str, model: SparseExpertModel, *, seed: int = 0, min_familiarity: float | None = None) -> Route:
    """Build a route by its name.

    Args:
        name: One of ROUTES, an expert, or the path of a YAML file with rules.
        model: The model whose experts serve the rows.
        seed: Of the baselines that draw.
        min_familiarity: Least familiarity of a text that the route ``gate`` answers, 0 to 1; None takes that of the
            checkpoint.

    Raises:
        ConfigError: If the name means nothing, the model has no gate or experts that fit, or nothing by which texts are
            turned away.
    """
    if min_familiarity is not None:
        check_familiarity(model, min_familiarity, route=name)
    if name == "gate" and model.token_gate is None:
        model.text_gate()  # refuses a gate that does not fit
    if name in ("task", "gate"):
        return Route(name, model, min_familiarity=min_familiarity)
    if name in BASELINES:
        if not model.routed:
            raise ConfigError(f"Route {name!r} needs at least one expert, and the model has none. Train one first.")
        return Route(name, model, chooser=BASELINES[name](len(model.routed), seed))
    if name == "arrow":
        return Route(name, model, arrow=arrow_gate(model))
    if Path(name).suffix in {".yaml", ".yml"}:
        return Route(name, model, chooser=Rules(model.routed, load_rules(name)))
    if name in model.experts.names:
        return Route(name, model, expert=name)
    known = [*ROUTES, *model.experts.names]
    raise ConfigError(unknown_name("route", name, known) + " A YAML file with rules works, too.")


def check_familiarity(model: SparseExpertModel, threshold: float, *, route: str = "gate") -> None:
    """Refuse a least familiarity that nothing can be measured by.

    Raises:
        ConfigError: If it is no share, the gate does not choose, or the gate has no statistics of its texts.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(
            f"--min-familiarity is {threshold}, but it is the share of your own texts to turn away, from 0 to 1. Give "
            "e.g. 0.01, or 0 to answer every text."
        )
    if route != "gate":
        raise ConfigError(
            f"--min-familiarity is for texts that the gate chooses the tasks of, and the route is {route!r}. Leave one "
            "of the two out."
        )
    gate = model.sequence_gate
    if gate is None or not gate.familiarity.fitted:
        what = "gate" if model.gate is None else "gate for whole texts" if gate is None else "statistics of its texts"
        fit = "Fit one with `sparse-ft train --stage gate --from CHECKPOINT`."
        if len(model.routed) < 2 or any(slot.joint for slot in model.tasks.values()):
            fit = "None can be fitted, because its tasks share their experts. Leave the option out."
        raise ConfigError(
            f"--min-familiarity is {threshold}, but this checkpoint has no {what} to measure it by. {fit}"
        )
    if not gate.by_group:
        _LOG.warning(
            "The gate of this checkpoint was fitted by version 0.1, so --min-familiarity is the share of all training "
            "texts together, not of each task's. `sparse-ft train --stage gate --from CHECKPOINT` fits it anew."
        )


def heaviest(routing: Routing, names: Sequence[str]) -> list[str | None]:
    """Return the expert with the largest weight in each row; None for an unknown row.

    Args:
        routing: Of rows.
        names: All experts of the model, in its order.
    """
    weights = routing.dense_weights(len(names))
    pairs = zip(weights.argmax(-1).tolist(), weights.sum(-1).tolist(), strict=True)
    return [names[best] if total > 0 else None for best, total in pairs]
