"""Export to ONNX: one graph for one task, or for the experts and heads of all tasks.

With several experts the graph has the input ``expert`` [rows], and each row fetches the matrices of its own; a single
one is folded into the weights. All heads read all rows; who runs it takes the output of the task that a row is for.
"""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone import Backbone
from sparse_ft.errors import ConfigError, ExportError
from sparse_ft.experts import Expert
from sparse_ft.exporters.parts import load_tokenizer, save_tokenizer, sole_expert
from sparse_ft.folders import write_json
from sparse_ft.folding import fold, fresh_copy
from sparse_ft.heads import pool
from sparse_ft.kinds import find_kind
from sparse_ft.prediction import LoadedModel
from sparse_ft.round_trip import Difference, Run, compare, sample_texts
from sparse_ft.word_shapes import SHAPES

GRAPH = "model.onnx"
TASKS = "tasks.json"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Say how to install what ONNX needs if it is missing.

    Raises:
        ConfigError: If it is.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"An export to onnx needs {', '.join(missing)}, which is not installed. Install it with "
            '`pip install "sparse-ft[onnx]"`.'
        )


def write_onnx(model: LoadedModel, tasks: Sequence[str], folder: Path) -> dict[str, Difference]:
    """Write the graph of some tasks into a folder, and run it through onnxruntime.

    Args:
        model: The checkpoint.
        tasks: Tasks of it.
        folder: To write into.

    Raises:
        ExportError: If a task cannot be expressed so.
        ConfigError: If a package is missing.
    """
    require_onnx()
    inner = model.checkpoint.model
    experts = {expert.name: expert for expert in (sole_expert(model, task) for task in tasks)}
    if len(experts) > 1 and not inner.backbone.family.routes_rows:
        raise ExportError(
            f"The layers of {inner.backbone.config.model_type!r} do not see one row a text, so one graph cannot hold "
            f"its {len(experts)} experts. Export one task at a time with --task."
        )
    graph = _Graph(model, tasks, list(experts.values()))
    _trace(graph, folder / GRAPH)
    save_tokenizer(model, folder)
    described = _describe(model, tasks, graph)
    write_json(folder / TASKS, described)
    session, tokenizer = load_session(folder / GRAPH), load_tokenizer(folder)
    return {
        task: compare(
            model, task, sample_texts(model, task), run=runner(session, task, described["tasks"]), tokenizer=tokenizer
        )
        for task in tasks
    }


def load_session(file: Path) -> Any:
    """Open a graph with onnxruntime, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def read_tasks(folder: Path) -> dict[str, Any]:
    """Read what tasks.json says of each task of a graph."""
    return dict(json.loads((folder / TASKS).read_text(encoding="utf-8"))["tasks"])


def runner(session: Any, task: str, described: dict[str, Any]) -> Run:
    """Return what runs batches of a task through a graph.

    Args:
        session: As ``load_session`` gives it.
        task: The task.
        described: Of the tasks, as in tasks.json.
    """
    names = {entry.name for entry in session.get_inputs()}

    def run(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        shapes = torch.zeros_like(ids)
        experts = torch.full((len(ids),), described[task]["expert"])
        given = {"word_shapes": shapes, "token_type_ids": torch.zeros_like(ids), "expert": experts, **batch}
        feed = {name: value.numpy() for name, value in given.items() if name in names}
        (found,) = session.run([task], feed)
        return torch.from_numpy(found)

    return run


def _describe(model: LoadedModel, tasks: Sequence[str], graph: "_Graph") -> dict[str, Any]:
    """Say what a user of the graph must know to feed and read it."""
    inputs = {
        "input_ids": "[rows, tokens] int64, of the tokenizer in this folder",
        "attention_mask": "[rows, tokens] int64, 1 for real tokens, padding on the right",
    }
    if graph.has_types:
        inputs["token_type_ids"] = "[rows, tokens] int64, of the tokenizer; 0 for single texts"
    if graph.tables is not None:
        inputs["word_shapes"] = (
            "[rows, tokens] int64, index in shapes of how the word of each token is written; 0 outside words and in "
            "tasks on texts"
        )
    if len(graph.experts) > 1:
        inputs["expert"] = "[rows] int64, the expert of the task that each row is for"
    found = {}
    for task in tasks:
        spec = model.tasks[task]
        kind, slot = find_kind(spec.kind), model.checkpoint.model.tasks[task]
        found[task] = {
            "expert": [expert.name for expert in graph.experts].index(slot.experts[0]),
            "kind": spec.kind,
            "output": "[rows, tokens, labels]" if kind.level == "word" else "[rows, labels]",
            "labels": kind.outputs(spec.label_names or []),
            **({"tag_of_word_at": "last" if model.encoder.last_piece else "first"} if kind.level == "word" else {}),
        }
    return {
        "inputs": inputs,
        **({"shapes": list(SHAPES)} if graph.tables is not None else {}),
        "max_length": model.encoder.max_length,
        "tasks": found,
    }


class _Pass:
    """What the layers of a graph see besides their input; no tensor of a module, so that tracing leaves it alone."""

    def __init__(self) -> None:
        self.expert: Tensor | None = None
        self.word_shapes: Tensor | None = None


class _Layer(nn.Module):
    """A linear and the deltas of all experts, in plain operations: a row fetches the matrices of its expert.

    Experts of a lower rank are filled with zeros, those without this layer altogether.
    """

    def __init__(
        self, frozen: nn.Module, deltas: Sequence[tuple[Tensor, Tensor, float] | None], running: _Pass
    ) -> None:
        super().__init__()
        self.frozen, self.running = frozen, running
        present = [delta for delta in deltas if delta is not None]
        rank, width = max(len(delta[0]) for delta in present), present[0][0].shape[1]
        bank_a = torch.zeros(len(deltas), width, rank)
        bank_b = torch.zeros(len(deltas), rank, present[0][1].shape[0])
        for place, delta in enumerate(deltas):
            if delta is not None:
                lora_a, lora_b, alpha = delta
                bank_a[place, :, : len(lora_a)] = lora_a.t()
                bank_b[place, : len(lora_a)] = lora_b.t() * (alpha / len(lora_a))
        self.bank_a, self.bank_b = nn.Parameter(bank_a, requires_grad=False), nn.Parameter(bank_b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, S, I] -> [N, S, O]; GPT-2 gives some of its linears [N * S, I]
        expert = self.running.expert
        assert expert is not None
        rows = x.reshape(expert.shape[0], -1, x.shape[-1])
        delta = rows @ self.bank_a[expert] @ self.bank_b[expert]
        return self.frozen(x) + delta.reshape(*x.shape[:-1], delta.shape[-1])


class _Graph(nn.Module):
    """Backbone, experts and heads of some tasks in operations that ONNX has.

    Args:
        model: The checkpoint.
        tasks: Whose heads are in it.
        experts: Of these tasks; one is folded into the weights.
    """

    def __init__(self, model: LoadedModel, tasks: Sequence[str], experts: Sequence[Expert]) -> None:
        super().__init__()
        inner = model.checkpoint.model
        backbone = fresh_copy(inner.backbone)
        self.experts, self.running, self.pooling = experts, _Pass(), inner.pooling
        self.model, self.causal = backbone.model, backbone.family.causal
        self.has_types = model.encoder.has_types
        if len(experts) == 1:
            fold(backbone, experts[0])
        else:
            self._add_layers(backbone)
        tables = [expert.word_shapes for expert in experts]
        self.tables = None
        if any(table is not None for table in tables):
            filled = [torch.zeros(len(SHAPES), backbone.hidden_size) if table is None else table for table in tables]
            # What is no word adds nothing.
            self.tables = nn.Parameter(torch.stack([torch.cat([0 * table[:1], table[1:]]) for table in filled]))
            self._add_word_shapes(backbone)
        self.heads = nn.ModuleList()
        self.outputs = list(tasks)
        self.words = [find_kind(model.tasks[task].kind).level == "word" for task in tasks]
        for task in tasks:
            linear = nn.Linear(*inner.head(task).linear.weight.shape[::-1])
            linear.load_state_dict(inner.head(task).linear.state_dict())
            self.heads.append(linear)

    def _add_layers(self, backbone: Backbone) -> None:
        for name in dict.fromkeys(name for expert in self.experts for name in expert.deltas):
            deltas = [
                (*expert.deltas[name], expert.alpha) if name in expert.deltas else None for expert in self.experts
            ]
            parent, _, attribute = name.rpartition(".")
            setattr(
                backbone.model.get_submodule(parent), attribute, _Layer(backbone.linears[name], deltas, self.running)
            )

    def _add_word_shapes(self, backbone: Backbone) -> None:
        """Add the vectors of each expert where its lowest block begins."""
        lowest: dict[int, list[int]] = {}
        for place, expert in enumerate(self.experts):
            if expert.word_shapes is not None:
                block = min((backbone.block_of(name) for name in expert.deltas), default=0)
                lowest.setdefault(block, []).append(place)
        for block, places in lowest.items():
            backbone.blocks[block].register_forward_pre_hook(self._adder(places), with_kwargs=True)

    def _adder(self, places: Sequence[int]) -> Callable[..., Any]:
        own = torch.zeros(len(self.experts), 1, 1)
        own[list(places)] = 1.0

        def add(
            _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            expert, shapes = self.running.expert, self.running.word_shapes
            assert self.tables is not None
            assert shapes is not None
            tables = self.tables * own  # [E, shapes, hidden]
            vectors = tables[0][shapes] if expert is None else tables[expert.unsqueeze(1), shapes]
            if arguments:
                return (arguments[0] + vectors, *arguments[1:]), named
            return arguments, {**named, "hidden_states": named["hidden_states"] + vectors}

        return add

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        word_shapes: Tensor | None = None,
        expert: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the logits of each task, [N, labels] or [N, S, tags]."""
        self.running.expert, self.running.word_shapes = expert, word_shapes
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.causal:
            inputs["use_cache"] = False
        hidden = self.model(**inputs).last_hidden_state
        text = pool(hidden, attention_mask, self.pooling)
        return tuple(head(hidden if words else text) for head, words in zip(self.heads, self.words, strict=True))

    def example(self) -> dict[str, Tensor | None]:
        """Return inputs to trace with: three rows of eleven tokens."""
        ids = torch.arange(33).reshape(3, 11) % 7 + 5
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(ids) if self.has_types else None,
            "word_shapes": torch.ones_like(ids) if self.tables is not None else None,
            "expert": torch.arange(3) % len(self.experts) if len(self.experts) > 1 else None,
        }


def _trace(graph: _Graph, file: Path) -> None:
    """Write a graph with any number of rows and tokens."""
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=1)
    given = {name: value for name, value in graph.example().items() if value is not None}
    shapes = {name: {0: rows, 1: tokens} if value.dim() == 2 else {0: rows} for name, value in given.items()}
    with _quiet():
        program = torch.onnx.export(
            graph.eval(), kwargs=given, dynamo=True, dynamic_shapes=shapes, output_names=graph.outputs, verbose=False
        )
    assert program is not None
    program.save(str(file))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
