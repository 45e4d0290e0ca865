"""The routings that ``evaluate --route`` compares: by task, by the gate, by rules, and the baselines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Example
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.gates import Gate, GateInput
from sparse_ft.experts.inference import text_routing
from sparse_ft.experts.model import SparseExpertModel, check_token_routing
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection
from sparse_ft.prediction.baselines import (
    ArrowGate,
    BernoulliGate,
    HashGate,
    LoadAwareGate,
    RandomGate,
    RoundRobinGate,
    UniformGate,
)
from sparse_ft.prediction.rules import Rules, load_rules


class _RowGate(Protocol):
    """Chooses among the experts ``names`` once a row."""

    names: list[str]

    def route(self, inputs: GateInput) -> Routing: ...


# Built with the experts' names and a seed.
BASELINES: dict[str, Callable[[Sequence[str], int], _RowGate]] = {
    "uniform": lambda names, seed: UniformGate(names),
    "random": lambda names, seed: RandomGate(names, seed=seed),
    "round_robin": lambda names, seed: RoundRobinGate(names),
    "hash": lambda names, seed: HashGate(names),
    "load_aware": lambda names, seed: LoadAwareGate(names, seed=seed),
    "bernoulli": lambda names, seed: BernoulliGate(names, seed=seed, p=0.5),
}
ROUTES = ("task", "gate", "arrow", *BASELINES)

# Last parts of the names of linears that read what enters their block (its attention's), in the families we know.
_READ_THE_INPUT = frozenset({
    "query", "key", "value", "q_lin", "k_lin", "v_lin", "query_proj", "key_proj", "value_proj", "Wqkv", "c_attn",
    "query_key_value", "q_proj", "k_proj", "v_proj",
})  # fmt: skip


class Route:
    """One way to route the rows of several tasks.

    Args:
        name: Of ROUTES, an expert, or the path of a YAML file with rules.
        model: With the experts.
        seed: Of the baselines that draw.

    Raises:
        ConfigError: If the name means nothing, or the model has no gate that fits.
    """

    def __init__(self, name: str, model: SparseExpertModel, *, seed: int) -> None:
        self.name, self.model = name, model
        self.gate: _RowGate | None = None
        names = model.routed
        if name == "gate":
            if model.token_gate is None:
                model.text_gate()
        elif name in BASELINES:
            self.gate = BASELINES[name](names, seed)
        elif name == "arrow":
            self.gate = arrow_gate(model)
        elif Path(name).suffix in {".yaml", ".yml"}:
            self.gate = Rules(names, load_rules(Path(name)))
        elif name != "task" and name not in model.experts.names:
            known = [*ROUTES, *model.experts.names]
            raise ConfigError(unknown_name("route", name, known) + " A YAML file with rules works, too.")

    def token_gate(self, task: str | None = None) -> Gate | None:
        """Return the gate that is asked at every block while the rows of a task go through the model, if one is."""
        if self.gate is not None:
            return self.gate if isinstance(self.gate, ArrowGate) else None
        asked = self.name == "gate" or (self.name == "task" and task is not None and self.model.tasks[task].gated)
        return self.model.token_gate if asked else None

    def rows(
        self, examples: Sequence[Example], texts: Sequence[str], *, task: str | None = None, language: str | None = None
    ) -> Routing:
        """Route examples as wholes.

        Args:
            examples: Rows of model input.
            texts: What the ``row`` of an example points to.
            task: That they belong to, which only the route ``task`` asks for.
            language: Of the texts, for rules; None leaves it to their characters.
        """
        if self.name == "gate":
            return text_routing(self.model, examples)
        if self.gate is None:
            expert = self.name
            if self.name == "task":
                assert task is not None
                if self.model.tasks[task].gated:
                    return text_routing(self.model, examples, task=task)
                (expert,) = self.model.tasks[task].experts
            index = self.model.experts.index(expert)
            return Routing.one_hot([index] * len(examples), device=self.model.device)
        nothing = torch.zeros(len(examples), 1, 0, device=self.model.device)
        mask = torch.ones(len(examples), 1, device=self.model.device)
        own = [texts[example.row] for example in examples]
        metadata = [] if language is None else [{"language": language}] * len(examples)
        routing = self.gate.route(GateInput(nothing, mask, 0, own, metadata))
        places = [self.model.experts.index(name) for name in self.gate.names]
        return routing.reindexed(places, num_experts=len(self.model.experts.names))

    def warnings(self) -> list[str]:
        """Say what about the rules should be looked at, after all rows were routed."""
        if not isinstance(self.gate, Rules):
            return []
        return [f"Rule {number} of {self.name} never matched." for number in self.gate.unmatched()]


def arrow_gate(model: SparseExpertModel, *, top_k: int = 2) -> ArrowGate:
    """Build the gate that reads the experts' weights; see ``ArrowGate``.

    Args:
        model: With at least one expert that changes the linears which read a block's input.
        top_k: Experts a token; cut to the number there are.

    Raises:
        ConfigError: If the architecture cannot route tokens.
    """
    check_token_routing(model)
    names, hidden = model.routed, model.backbone.hidden_size
    places = [model.experts.index(name) for name in names]
    vectors = {
        block: torch.stack([_first_singular_vector(model, index, block, hidden) for index in places])
        for block in range(model.first_block, model.backbone.num_blocks)
    }
    moved = {block: value.to(model.device) for block, value in vectors.items()}
    return ArrowGate(names, moved, selection=Selection(top_k=min(top_k, len(names))))


def _first_singular_vector(model: SparseExpertModel, index: int, block: int, hidden: int) -> Tensor:
    """Return the direction [H] that an expert's deltas amplify most, 0 if it has none in this block."""
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    for name, layer in model.experts.layers.items():
        reads = name.rpartition(".")[2] in _READ_THE_INPUT and layer.in_features == hidden
        if reads and model.backbone.block_of(name) == block and layer.ranks[index]:
            lora_a, lora_b = (matrix.detach().cpu().double() for matrix in layer.get(index))
            gram += layer.scales[index] ** 2 * lora_a.t() @ (lora_b.t() @ lora_b) @ lora_a
    if not gram.any():
        return torch.zeros(hidden)
    return torch.linalg.eigh(gram).eigenvectors[:, -1].float()
