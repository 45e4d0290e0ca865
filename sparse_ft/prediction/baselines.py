"""Gates without learned weights, to compare the learned ones with.

``UniformGate`` and ``HashGate`` give the same answer for the same text whatever else is in the batch; what the others
answer depends on what they were asked before. Random numbers are drawn on the CPU, so that every device sees the same.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import GateInput, _float32
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection


class UniformGate:
    """Every expert with weight 1 / E; the same for every text.

    Args:
        names: All experts of the model, in its order.
    """

    every_block = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = _at_least_one(names)

    def route(self, inputs: GateInput) -> Routing:
        """Mix all experts equally."""
        shape = (len(inputs.hidden), len(self.names))
        return Routing(None, torch.full(shape, 1 / len(self.names), device=inputs.hidden.device))


class RandomGate:
    """One expert a row, all equally probable; the answer for a text changes from call to call.

    Args:
        names: All experts of the model, in its order.
        seed: The same seed and the same order of calls give the same answers.
    """

    every_block = False

    def __init__(self, names: Sequence[str], *, seed: int) -> None:
        self.names = _at_least_one(names)
        self.generator = torch.Generator().manual_seed(seed)

    def route(self, inputs: GateInput) -> Routing:
        """Draw an expert for each row."""
        drawn = torch.randint(len(self.names), (len(inputs.hidden),), generator=self.generator)
        return Routing.one_hot(drawn.tolist(), device=inputs.hidden.device)


class RoundRobinGate:
    """The experts in turn, row after row and batch after batch; the answer for a text depends on its place.

    Args:
        names: All experts of the model, in its order.
    """

    every_block = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = _at_least_one(names)
        self.next = 0
        """Index of the expert that serves the next row."""

    def route(self, inputs: GateInput) -> Routing:
        """Give each row the expert after that of the row before."""
        num_rows = len(inputs.hidden)
        experts = [(self.next + row) % len(self.names) for row in range(num_rows)]
        self.next = (self.next + num_rows) % len(self.names)
        return Routing.one_hot(experts, device=inputs.hidden.device)


class HashGate:
    """One expert a row by the SHA-256 of its text: the same in every batch, process and machine.

    Hash layers, but of whole texts: Roller et al. 2021, https://arxiv.org/abs/2106.04426. Another number of experts
    deals all texts anew.

    Args:
        names: All experts of the model, in its order.
    """

    every_block = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = _at_least_one(names)

    def route(self, inputs: GateInput) -> Routing:
        """Give each row the expert that its text hashes to.

        Raises:
            ConfigError: If the texts are not known.
        """
        num_rows = len(inputs.hidden)
        if len(inputs.texts) != num_rows:
            raise ConfigError(
                f"The hash gate needs the text of each row and got {len(inputs.texts)} texts for {num_rows} rows. "
                "Give the texts as they were before encoding, or choose a gate that does not read them, e.g. uniform."
            )
        return Routing.one_hot([self._expert(text) for text in inputs.texts], device=inputs.hidden.device)

    def _expert(self, text: str) -> int:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # JSON may hold half a surrogate pair
        return int.from_bytes(digest[:8], "big") % len(self.names)


class LoadAwareGate:
    """One expert a row, drawn with a probability proportional to 1 / (1 + the rows it has served).

    The answer for a text depends on all rows before it.

    Args:
        names: All experts of the model, in its order.
        seed: The same seed and the same order of calls give the same answers.
    """

    every_block = False

    def __init__(self, names: Sequence[str], *, seed: int) -> None:
        self.names = _at_least_one(names)
        self.generator = torch.Generator().manual_seed(seed)
        self.load = torch.zeros(len(self.names))
        """Rows that each expert has served, [E]."""

    def route(self, inputs: GateInput) -> Routing:
        """Draw an expert for each row, the idle ones more often."""
        return Routing.one_hot([self._draw() for _ in range(len(inputs.hidden))], device=inputs.hidden.device)

    def _draw(self) -> int:
        expert = int(torch.multinomial(1 / (1 + self.load), 1, generator=self.generator))
        self.load[expert] += 1
        return expert


class BernoulliGate:
    """Each expert of its own with probability p, at least one, all with the same weight, which sum to 1.

    The answer for a text changes from call to call.

    Args:
        names: All experts of the model, in its order.
        seed: The same seed and the same order of calls give the same answers.
        p: Above 0, at most 1. A row that draws none gets one expert, all equally probable.

    Raises:
        ConfigError: If p is not a probability above 0.
    """

    every_block = False

    def __init__(self, names: Sequence[str], *, seed: int, p: float) -> None:
        if not 0 < p <= 1:
            raise ConfigError(f"The Bernoulli gate got p={p!r}; give a probability above 0 and at most 1, e.g. 0.5.")
        self.names = _at_least_one(names)
        self.p = p
        self.generator = torch.Generator().manual_seed(seed)

    def route(self, inputs: GateInput) -> Routing:
        """Draw the experts of each row."""
        drawn = self._uniform(len(inputs.hidden)) < self.p  # [N, E]
        spare = torch.nn.functional.one_hot(self._uniform(len(inputs.hidden)).argmax(-1), len(self.names)).bool()
        chosen = torch.where(drawn.any(-1, keepdim=True), drawn, spare)
        return Routing(None, (chosen / chosen.sum(-1, keepdim=True)).to(inputs.hidden.device))

    def _uniform(self, num_rows: int) -> Tensor:
        return torch.rand(num_rows, len(self.names), generator=self.generator)


def _at_least_one(names: Sequence[str]) -> list[str]:
    if not names:
        raise ConfigError("A gate needs at least one expert to choose and got none. Add an expert to the model first.")
    return list(names)


class ArrowGate(nn.Module):
    """Routes each token by the experts' weights: the larger their first right singular vector responds, the better.

    Ostapenko et al. 2024, "Towards modular LLMs by building and reusing a library of LoRAs",
    https://arxiv.org/abs/2405.11157, section 3.2. One vector a block and expert, of all its deltas that read what
    enters the block, stacked.

    Args:
        names: Experts to choose among.
        vectors: Block to [E, H], each row of length 1, or 0 for an expert without deltas there.
        selection: How the logits become a routing.
    """

    every_block = True

    def __init__(self, names: Sequence[str], vectors: Mapping[int, Tensor], *, selection: Selection) -> None:
        super().__init__()
        self.names = list(names)
        self.selection = selection
        self.blocks = list(vectors)
        self.vectors = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in vectors.values())

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each token of one block."""
        vectors = self.vectors[self.blocks.index(inputs.block)]
        with _float32(inputs.hidden):
            logits = (inputs.hidden.float() @ vectors.t()).abs()
        return self.selection(logits, mask=inputs.attention_mask)
