"""The named experts on a backbone: add, remove, copy and train them."""

import hashlib
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_ft.backbone.words import SHAPES
from sparse_ft.errors import CheckpointError, ConfigError, unknown_name
from sparse_ft.experts.layer import ExpertLayer, linear_shape
from sparse_ft.experts.routing import RoutingSlot
from sparse_ft.experts.word_shapes import WordShapes


def named_generator(seed: int, name: str) -> torch.Generator:
    """Make a generator whose numbers depend on the seed and the name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % (1 << 63))


@dataclass
class Expert:
    """A named set of low-rank deltas outside any model.

    Shapes: r rank, I inputs and O outputs of a linear, H hidden size.
    """

    name: str
    alpha: float
    deltas: dict[str, tuple[Tensor, Tensor]]
    """Full module name to (A [r, I], B [O, r])."""
    word_shapes: Tensor | None = None
    """[shapes, H], vectors that are added to words of each shape (word_shapes.py); None for an expert without."""
    shapes_block: int | None = None
    """0-based block before which ``word_shapes`` are added; None: the lowest that the expert changes."""
    ranks: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = {module: lora_a.shape[0] for module, (lora_a, _) in self.deltas.items()}


def sum_of_experts(name: str, experts: Sequence[Expert]) -> Expert:
    """Return one expert whose deltas are the sums of those of several; their ranks add up.

    Args:
        name: Of the new expert.
        experts: At least one; at most one of them has word shapes.
    """
    alpha, deltas = experts[0].alpha, {}
    for module in dict.fromkeys(module for expert in experts for module in expert.deltas):
        parts = [expert for expert in experts if module in expert.deltas]
        rank = sum(expert.ranks[module] for expert in parts)
        scaled = [expert.deltas[module][1] * (expert.alpha / expert.ranks[module]) for expert in parts]
        lora_a = torch.cat([expert.deltas[module][0] for expert in parts])
        deltas[module] = (lora_a, torch.cat(scaled, 1) * (rank / alpha))
    shaped = next((expert for expert in experts if expert.word_shapes is not None), experts[0])
    return Expert(name, alpha, deltas, shaped.word_shapes, shaped.shapes_block)


class Experts:
    """The named experts on a backbone, and the layers that hold them.

    A linear becomes an expert layer when the first expert that changes it is added. The blocks below the lowest expert
    layer are the same for all tasks and need no backward pass.

    Args:
        model: The backbone's model, whose linears are replaced in place.
        linears: Full module name to every linear that experts may change.
        block_of: Returns the 0-based block of a linear, by name.
        hidden_size: H.
        slot: Holds the routing for every layer.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Module],
        *,
        block_of: Callable[[str], int],
        hidden_size: int,
        slot: RoutingSlot,
    ) -> None:
        self.names: list[str] = []
        self.layers: dict[str, ExpertLayer] = {}
        self.alphas: dict[str, float] = {}
        self.word_shapes = WordShapes(hidden_size)
        self._block_of = block_of
        self._model = model
        self._linears = dict(linears)
        self._slot = slot
        self._contents: dict[tuple[int, int], Hashable] = {}

    def _wrap(self, name: str) -> None:
        layer = ExpertLayer(self._linears[name], slot=self._slot)
        layer.extend([None] * len(self.names), scales=[1.0] * len(self.names))
        self._put(name, layer)
        self.layers[name] = layer

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)

    def index(self, name: str) -> int:
        """Return the index of an expert.

        Raises:
            ConfigError: If there is no such expert.
        """
        if name not in self.names:
            raise ConfigError(unknown_name("expert", name, self.names))
        return self.names.index(name)

    def lowest_block(self, names: Collection[str], *, default: int) -> int:
        """Return the lowest 0-based block that one of some experts changes; ``default`` if they change none.

        Raises:
            ConfigError: If there is no expert of a name.
        """
        indices = [self.index(name) for name in names]
        changed = [module for module, layer in self.layers.items() if any(layer.ranks[index] for index in indices)]
        return min(map(self._block_of, changed), default=default)

    def create(
        self,
        name: str,
        *,
        modules: Sequence[str],
        rank: int,
        alpha: float,
        seed: int,
        word_shapes: bool = False,
        drawn_as: str | None = None,
    ) -> None:
        """Add a new expert: A uniform as in PEFT, the rest zero, so at first it computes the same as the bare backbone.

        The numbers depend on ``seed`` and ``drawn_as`` (None: ``name``) only, not on other experts.
        """
        generator = named_generator(seed, f"expert/{drawn_as or name}")
        deltas = {}
        for module in modules:
            out_features, in_features = linear_shape(self._linears[module])
            # LoRA's authors use kaiming_uniform_(a=sqrt(5)), which is uniform within 1 / sqrt(I):
            # https://github.com/microsoft/LoRA/blob/c4593f060e6a368d7bb5af5273b8e42810cdef90/loralib/layers.py#L119-L124
            bound = 1 / math.sqrt(in_features)
            lora_a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
            deltas[module] = (lora_a, torch.zeros(out_features, rank))
        table = torch.zeros(len(SHAPES), self.word_shapes.hidden_size) if word_shapes else None
        self.add(Expert(name, alpha, deltas, table))

    def add(self, *experts: Expert) -> None:
        """Add experts, all or none of them; the numbers of existing experts do not change.

        Raises:
            CheckpointError: If a name is taken, or a delta does not fit this backbone.
        """
        taken = list(self.names)
        for expert in experts:
            _check_free(expert.name, taken)
            self._check(expert)
            taken.append(expert.name)
        for module in dict.fromkeys(module for expert in experts for module in expert.deltas):
            if module not in self.layers:
                self._wrap(module)
        for module, layer in self.layers.items():
            deltas = [expert.deltas.get(module) for expert in experts]
            scales = [
                1.0 if delta is None else expert.alpha / delta[0].shape[0]
                for expert, delta in zip(experts, deltas, strict=True)
            ]
            layer.extend(deltas, scales=scales)
        for expert in experts:
            self._register(expert)
        self._contents.clear()

    def _register(self, expert: Expert) -> None:
        """Append an expert's word shapes, name and alpha."""
        block = expert.shapes_block
        if block is None:
            block = min((self._block_of(module) for module in expert.deltas), default=0)
        self.word_shapes.add(expert.word_shapes, block=block, device=next(self._model.parameters()).device)
        self.names.append(expert.name)
        self.alphas[expert.name] = expert.alpha

    def _check(self, expert: Expert) -> None:
        """Refuse an expert that does not fit this backbone."""
        for module, (lora_a, lora_b) in expert.deltas.items():
            if module not in self._linears:
                raise CheckpointError(
                    f"Expert {expert.name!r} changes the layer {module!r}, which this backbone does not have in its "
                    "blocks. It was trained on another backbone."
                )
            shape = linear_shape(self._linears[module])
            if (lora_b.shape[0], lora_a.shape[1]) != shape or lora_a.shape[0] != lora_b.shape[1]:
                raise CheckpointError(
                    f"Expert {expert.name!r} has A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)} for the layer "
                    f"{module!r} of {shape[1]} inputs and {shape[0]} outputs. It belongs to another backbone."
                )
        table_shape = (len(SHAPES), self.word_shapes.hidden_size)
        if expert.word_shapes is not None and expert.word_shapes.shape != table_shape:
            raise CheckpointError(
                f"Expert {expert.name!r} has word shapes {tuple(expert.word_shapes.shape)}, expected {table_shape}. It "
                "belongs to another backbone or version."
            )

    def remove(self, name: str) -> None:
        """Remove an expert; the numbers of the others do not change. A layer without experts becomes a plain linear."""
        index = self.index(name)
        for module, layer in list(self.layers.items()):
            layer.remove(index)
            if not any(layer.ranks):
                self._put(module, layer.frozen)
                del self.layers[module]
        self.word_shapes.remove(index)
        del self.names[index], self.alphas[name]
        self._contents.clear()

    def rename(self, old: str, new: str) -> None:
        """Give an expert another name.

        Raises:
            ConfigError: If there is no such expert.
            CheckpointError: If the new name is taken.
        """
        index = self.index(old)
        _check_free(new, self.names)
        self.names[index] = new
        self.alphas[new] = self.alphas.pop(old)

    def replace(self, expert: Expert) -> None:
        """Replace the expert of the same name.

        Earlier results of ``parameters`` for it, or for an expert behind it, are invalid after this.
        """
        removed = [self.get(name) for name in self.names[self.index(expert.name) :]]
        self._check(expert)
        for old in removed:
            self.remove(old.name)
        self.add(expert, *removed[1:])

    def get(self, name: str) -> Expert:
        """Return a copy of an expert, with the layers that it changes."""
        index = self.index(name)
        deltas = {}
        for module, layer in self.layers.items():
            lora_a, lora_b = layer.get(index)
            if len(lora_a):
                deltas[module] = (lora_a.detach().cpu().clone(), lora_b.detach().cpu().clone())
        table = self.word_shapes.tables[index].detach().cpu().clone()
        if not len(table):
            return Expert(name, self.alphas[name], deltas)
        return Expert(name, self.alphas[name], deltas, table, self.word_shapes.blocks[index])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return an expert's parameters: ``<module>.lora_A`` [I, r], ``<module>.lora_B`` [r, O], ``word_shapes``.

        A and B are transposed. They are views of the memory that the layers compute with.
        """
        index = self.index(name)
        self._contents.clear()  # the numbers may change from now on
        table = self.word_shapes.tables[index]
        parameters = {"word_shapes": table} if len(table) else {}
        for module, layer in self.layers.items():
            if layer.ranks[index]:
                parameters[f"{module}.lora_A"], parameters[f"{module}.lora_B"] = layer.open(index)
        return parameters

    def content(self, index: int, block: int) -> Hashable:
        """Return what an expert changes in a block: equal values have equal deltas; None changes nothing.

        An expert in training equals no other one.
        """
        key = (index, block)
        if key not in self._contents:
            self._contents[key] = self._read_content(index, block)
        return self._contents[key]

    def _read_content(self, index: int, block: int) -> Hashable:
        layers = {
            module: layer
            for module, layer in self.layers.items()
            if layer.ranks[index] and self._block_of(module) == block
        }
        table = self.word_shapes.tables[index] if self.word_shapes.starts(index, block) else None
        if not layers and table is None:
            return None
        if any(index in layer.opened for layer in layers.values()) or (table is not None and table.requires_grad):
            return index
        digest = hashlib.sha256()
        for module, layer in layers.items():
            digest.update(f"{module} {layer.ranks[index]} {layer.scales[index]}".encode())
            for part in layer.get(index):
                digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        if table is not None:
            digest.update(table.detach().cpu().numpy().tobytes())
        return digest.digest()

    def fold(self, name: str) -> None:
        """Add the delta of a fixed expert to a copy of each frozen weight (as PEFT's merge does); float32 only.

        The expert then costs no time, and the copies need the memory of the linears that it changes. Answers differ in
        the last bits.
        """
        index = self.index(name)
        for layer in self.layers.values():
            if layer.bank_b.dtype == next(layer.frozen.parameters()).dtype:
                layer.fold(index)

    def set_dropout(self, probability: float) -> None:
        """Set the dropout on the input of every delta, used in training only."""
        for layer in self.layers.values():
            layer.dropout = probability


def _check_free(name: str, taken: Sequence[str]) -> None:
    if name in taken:
        raise CheckpointError(f"There is an expert named {name!r} already: {', '.join(taken)}. Rename one.")
