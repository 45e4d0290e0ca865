"""The routing of one text: the experts that each of its tokens is sent to, block by block.

Shapes: B blocks with experts, S tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.words import split_words
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import Gate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.requests import form_of
from sparse_ft.prediction.routes import ROUTES, Route, find_route


class Token(NamedTuple):
    """One token of the text as the backbone reads it."""

    text: str
    start: int
    """Character offset into the text; equal to ``end`` for tokens that the tokenizer adds, such as [CLS]."""
    end: int
    """Exclusive."""


@dataclass(frozen=True)
class TokenRouting:
    """The routing of one text."""

    checkpoint: str
    route: str
    text: str
    tokens: list[Token]
    truncated: bool
    """Whether the text has more tokens than the checkpoint reads."""
    experts: list[str]
    blocks: list[int]
    """0-based blocks with experts, rising."""
    weights: Tensor
    """[B, S, E] float32; the same for all blocks and tokens if the text was routed as a whole."""
    by_token: bool
    """Whether every token was routed by itself; otherwise the text was routed as a whole."""
    probabilities: dict[str, float] | None = None
    """Expert to the probability that a learned gate gives it, or its group, for the whole text."""
    familiarity: float | None = None
    """Share of the chosen tasks' own texts that are at least as strange as this one, 0 to 1; None if it is unknown."""
    min_familiarity: float = 0.0
    """The familiarity below which the text is turned away."""

    @property
    def choosable(self) -> bool:
        """Whether there was anything to choose."""
        return len(self.experts) > 1 or not bool((self.weights == 1).all())

    @property
    def usage(self) -> dict[str, float]:
        """Expert to its mean weight over all tokens and blocks."""
        return dict(zip(self.experts, self.weights.mean((0, 1)).tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return what ``inspect --json`` prints; ``blocks`` of a token only where tokens were routed."""
        tokens: list[dict[str, Any]] = [token._asdict() for token in self.tokens]
        for position, token in enumerate(tokens if self.by_token else []):
            token["blocks"] = {
                str(block): _above_zero(self.experts, weights[position].tolist())
                for block, weights in zip(self.blocks, self.weights, strict=True)
            }
        return {
            "checkpoint": self.checkpoint,
            "route": self.route,
            "text": self.text,
            "truncated": self.truncated,
            "by_token": self.by_token,
            "experts": self.experts,
            "blocks": self.blocks,
            "usage": _above_zero(self.experts, list(self.usage.values())),
            **({} if self.probabilities is None else {"probabilities": self.probabilities}),
            **({} if self.familiarity is None else {"familiarity": self.familiarity}),
            "tokens": tokens,
        }


def route_tokens(
    checkpoint: str | Path | Checkpoint,
    text: str,
    *,
    route: str = "gate",
    device: str = "auto",
    backbone: str | None = None,
    min_familiarity: float | None = None,
) -> TokenRouting:
    """Route one text and return the experts that each of its tokens was sent to.

    The text is encoded as for a task on texts: one row, cut to ``data.max_length`` tokens. If a task of the checkpoint
    reads pairs, a tab separates the two texts of a pair.

    Args:
        checkpoint: A folder, or what ``load_checkpoint`` returned.
        text: Any text, also empty.
        route: ``gate``, an expert, the path of a YAML file with rules, or one of ``routes.ROUTES`` but ``task``.
        device: ``auto``, ``cpu``, ``cuda`` …
        backbone: Path of the backbone, if not that in the checkpoint.
        min_familiarity: With the route ``gate``, the share of each task's own texts to turn away as unknown, 0 to 1;
            None takes that of the checkpoint.

    Raises:
        ConfigError: If the route is unknown, or needs what the checkpoint lacks.
        CheckpointError: If the folder is no complete checkpoint.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, device=find_device(device), backbone=backbone)
    model = checkpoint.model
    way = _route_of_text(route, model, seed=checkpoint.config.seed, min_familiarity=min_familiarity)
    encoder = checkpoint.encoder
    pairs = any(spec.reads == "pair" for spec in checkpoint.tasks.values())
    form_of(text)  # refuses a text that is no Unicode
    parts = text.split("\t", 1) if pairs else [text]
    (example,) = encoder.texts(parts[:1], parts[1:] or None)
    tokens, truncated = _tokens(encoder, parts, example)
    gate = way.block_gate()
    if gate is not None:
        decision, blocks, weights = _Decision(), *_token_weights(model, example, gate)
    else:
        decision, served = _decide_text(way, model, text, example)
        blocks = list(range(model.first_block, model.backbone.num_blocks))
        weights = served.expand(len(blocks), len(tokens), -1)
    return TokenRouting(
        checkpoint=str(checkpoint.path),
        route=way.name,
        text=text,
        tokens=tokens,
        truncated=truncated,
        experts=model.routed,
        blocks=blocks,
        weights=weights[..., [model.experts.index(name) for name in model.routed]],
        by_token=gate is not None,
        probabilities=decision.probabilities,
        familiarity=decision.familiarity,
        min_familiarity=_threshold(model, min_familiarity),
    )


class _Decision(NamedTuple):
    """What a gate that decides once for the text says of it; both are None where no such gate decides."""

    probabilities: dict[str, float] | None = None
    familiarity: float | None = None


def _decide_text(way: Route, model: SparseExpertModel, text: str, example: Example) -> tuple[_Decision, Tensor]:
    """Route the text as a whole; return the decision of its gate, and the weights of all experts, [E] on the CPU."""
    routing = way.rows([example], texts=[text])
    served = routing.dense_weights(len(model.experts.names))[0].float().cpu()  # [E]
    if routing.logits is None:
        return _Decision(), served
    gate = model.text_gate()
    probabilities = gate.partition.probabilities(routing.logits)[0].tolist()
    familiarity = _familiarity(routing) if gate.familiarity.fitted else None
    decision = _Decision(dict(zip(gate.names, probabilities, strict=True)), familiarity)
    return decision, _spread_over_groups(served, model)


def _familiarity(routing: Routing) -> float | None:
    """Return the familiarity of the only text of a routing."""
    return None if routing.confidence is None else float(routing.confidence[0])


def _threshold(model: SparseExpertModel, min_familiarity: float | None) -> float:
    """Return the familiarity below which a gate turns a text away: the user's, else the checkpoint's."""
    if min_familiarity is not None or model.sequence_gate is None:
        return min_familiarity or 0.0
    return model.sequence_gate.selection.min_confidence


def _spread_over_groups(weights: Tensor, model: SparseExpertModel) -> Tensor:
    """Give every expert of a chosen group the weight of the group, as each serves its own tasks; [E] to [E]."""
    gate, spread = model.text_gate(), weights.clone()
    for group in gate.groups if not any(slot.joint for slot in model.tasks.values()) else []:
        spread[[model.experts.index(name) for name in group]] = weights[model.experts.index(group[0])]
    return spread


def _route_of_text(name: str, model: SparseExpertModel, *, seed: int, min_familiarity: float | None) -> Route:
    """Build the route of a text that belongs to no task; a checkpoint with one expert needs no gate."""
    experts = model.experts.names
    others = ", ".join([*(route for route in ROUTES if route not in ("task", "gate")), *experts])
    if name == "task":
        raise ConfigError(
            "--route 'task' sends a text to the expert of its task, but a text alone belongs to no task. Name the "
            f"expert itself, or choose another route: gate, {others}."
        )
    if name == "gate" and model.gate is None:
        if len(experts) > 1:
            raise ConfigError(
                "The checkpoint has no gate to choose among its experts. Fit one with `sparse-ft train --stage gate "
                f"--from CHECKPOINT`, or choose another --route: {others}."
            )
        name = experts[0]
    return find_route(name, model, seed=seed, min_familiarity=min_familiarity)


@torch.no_grad()
def _token_weights(model: SparseExpertModel, example: Example, gate: Gate) -> tuple[list[int], Tensor]:
    """Return the blocks at which a gate decided, and the weights of each token there, [B, S, E] on the CPU."""
    seen: dict[int, Routing] = {}
    joint = [task for task, slot in model.tasks.items() if slot.joint]  # their rows may use a shared expert, too
    batch = collate([(joint[0] if joint else "", example)], pad_id=model.backbone.pad_id, device=model.device)
    model.hidden_states(batch if joint else replace(batch, tasks=[]), gate=gate, block_routings=seen)
    by_block = [seen[block].dense_weights(len(model.experts.names))[0] for block in sorted(seen)]  # [S, E] each
    return sorted(seen), torch.stack([weights.expand(len(example.input_ids), -1) for weights in by_block]).float().cpu()


def _tokens(encoder: Encoder, parts: Sequence[str], example: Example) -> tuple[list[Token], bool]:
    """Return the tokens of the text, and whether some of them did not fit."""
    names = encoder.tokenizer.convert_ids_to_tokens(example.input_ids)
    words = split_words(parts[0]) if encoder.by_words and len(parts) == 1 else ()
    inputs = [[word.text for word in words]] if words else parts
    encoded = encoder.tokenizer(
        *inputs, is_split_into_words=bool(words), truncation=True, max_length=encoder.max_length
    ).encodings[0]
    if not encoded.ids:  # a text without tokens is read as one token of padding
        return [Token(name, 0, 0) for name in names], False
    text, second = "\t".join(parts), len(parts[0]) + 1
    tokens = []
    rows = zip(names, encoded.offsets, encoded.sequence_ids, encoded.word_ids, strict=True)
    for name, (start, end), part, word in rows:
        before = words[word].start if words and word is not None else second if part == 1 else 0
        tokens.append(Token(text[before + start : before + end] or name, before + start, before + end))
    return tokens, bool(encoded.overflowing)


def _above_zero(experts: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    return {expert: weight for expert, weight in zip(experts, weights, strict=True) if weight > 0}
