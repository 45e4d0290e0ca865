"""Baselines that choose experts for texts without learning anything, to compare learned gates with.

``UniformChooser`` and ``HashChooser`` give a text the same experts whatever else is in the batch; the choices of the
others depend on the calls before. Random numbers are drawn on the CPU, so that every device sees the same.

Shapes: N texts, E experts.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ft.errors import ConfigError
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.requests import Metadata


class UniformChooser:
    """All experts for every text, each with weight 1 / E.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Weight all experts equally."""
        return Routing(None, torch.full((len(texts), self.num_experts), 1 / self.num_experts))


class RandomChooser:
    """One expert a text, all equally probable; the choice for a text changes from call to call.

    Args:
        num_experts: E.
        seed: The same seed and the same order of calls give the same choices.
    """

    def __init__(self, num_experts: int, *, seed: int) -> None:
        self.num_experts = num_experts
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Draw an expert for each text."""
        return Routing.one_hot(torch.randint(self.num_experts, (len(texts),), generator=self.generator).tolist())


class RoundRobinChooser:
    """The experts in turn, text after text and call after call.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.next = 0
        """Index of the expert that serves the next text."""

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Give each text the expert after that of the text before."""
        experts = [(self.next + index) % self.num_experts for index in range(len(texts))]
        self.next = (self.next + len(texts)) % self.num_experts
        return Routing.one_hot(experts)


class HashChooser:
    """One expert a text by the SHA-256 of the text: the same in every batch, process and machine.

    Hash layers, but of texts in place of tokens: Roller et al. 2021, https://arxiv.org/abs/2106.04426. Another number
    of experts deals all texts anew.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Give each text the expert that it hashes to."""
        return Routing.one_hot([self._expert(text) for text in texts])

    def _expert(self, text: str) -> int:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # JSON may hold half a surrogate pair
        return int.from_bytes(digest[:8], "big") % self.num_experts


class LoadAwareChooser:
    """One expert a text, drawn with a probability proportional to 1 / (1 + the texts it has served).

    Args:
        num_experts: E.
        seed: The same seed and the same order of calls give the same choices.
    """

    def __init__(self, num_experts: int, *, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.load = torch.zeros(num_experts)
        """Texts that each expert has served, [E]."""

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Draw an expert for each text, the idle ones more often."""
        return Routing.one_hot([self._draw() for _ in texts])

    def _draw(self) -> int:
        expert = int(torch.multinomial(1 / (1 + self.load), 1, generator=self.generator))
        self.load[expert] += 1
        return expert


class BernoulliChooser:
    """Each expert with probability p, at least one a text, with equal weights that sum to 1.

    Args:
        num_experts: E.
        seed: The same seed and the same order of calls give the same choices.
        p: Above 0, at most 1. A text that draws none gets one expert, all equally probable.

    Raises:
        ConfigError: If p is not a probability above 0.
    """

    def __init__(self, num_experts: int, *, seed: int, p: float = 0.5) -> None:
        if not 0 < p <= 1:
            raise ConfigError(f"The Bernoulli route got p={p!r}; give a probability above 0 and at most 1, e.g. 0.5.")
        self.num_experts = num_experts
        self.p = p
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Draw the experts of each text."""
        drawn = self._uniform(len(texts)) < self.p  # [N, E]
        spare = torch.nn.functional.one_hot(self._uniform(len(texts)).argmax(-1), self.num_experts).bool()
        chosen = torch.where(drawn.any(-1, keepdim=True), drawn, spare)
        return Routing(None, chosen / chosen.sum(-1, keepdim=True))

    def _uniform(self, num_texts: int) -> Tensor:
        return torch.rand(num_texts, self.num_experts, generator=self.generator)
