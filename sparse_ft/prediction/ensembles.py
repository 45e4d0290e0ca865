"""One answer of several experts: their deltas mixed in one pass, their probabilities averaged, or their votes counted.

The functions on tensors return logits, so that an ensemble is decoded and scored like a single expert.

Shapes: M members of an ensemble, N words of a text, L labels or tags.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.inference import EncodedTexts, row_logits
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.constrained_decoding import best_legal_tags
from sparse_ft.tasks.kinds.kind import logits_of, probabilities_of
from sparse_ft.tasks.kinds.multi_label import THRESHOLD
from sparse_ft.tasks.kinds.token_classification import type_probabilities
from sparse_ft.tasks.schemes import Span, spans_from_tags
from sparse_ft.tasks.spec import TaskSpec

Combine = Literal["mix", "average", "vote"]
"""mix: all experts in one pass, their deltas and heads weighted equally; average: one pass an expert, the mean of the
probabilities; vote: one pass an expert, the majority, ties broken by confidence."""


class Member(NamedTuple):
    """An expert of an ensemble, and the task whose head reads its hidden states."""

    task: str
    expert: str


@dataclass(frozen=True)
class Ensemble:
    """The experts that answer one question together."""

    members: tuple[Member, ...]
    """At least two."""
    combine: Combine

    @property
    def experts(self) -> list[str]:
        """The experts of all members, each once."""
        return list(dict.fromkeys(member.expert for member in self.members))


def average(rows: Tensor, *, kind: str) -> Tensor:
    """Average the probabilities of several experts.

    Args:
        rows: Logits, [M, L] or [M, N, L].
        kind: Name of the task kind.

    Returns:
        Logits whose probabilities are the mean of the members' probabilities, [L] or [N, L].
    """
    task_kind = find_kind(kind)
    return logits_of(task_kind, probabilities_of(task_kind, rows).mean(0))


def vote(rows: Tensor, *, kind: str, outputs: Sequence[str]) -> Tensor:
    """Let the experts vote: for a label, for each label, or for each span, by the kind of the task.

    Args:
        rows: Logits, [M, L] or [M, N, L].
        kind: Name of the task kind.
        outputs: Names of the L columns.

    Returns:
        Logits of the answer of the majority, [L] or [N, L]. Its probability is the mean over the experts that voted for
        it, and at least a little more than an even share.
    """
    task_kind = find_kind(kind)
    return logits_of(task_kind, _VOTES[kind](probabilities_of(task_kind, rows), outputs))


def _vote_label(probabilities: Tensor, outputs: Sequence[str]) -> Tensor:
    """Elect the label with the most votes; of several, the one whose voters are surest."""
    confidence, voted = probabilities.max(-1)  # [M]
    votes = torch.zeros(len(outputs)).index_add(0, voted, torch.ones(len(voted)))
    mean = torch.zeros(len(outputs)).index_add(0, voted, confidence) / votes.clamp_min(1)
    winner = int(torch.where(votes == votes.max(), mean, -1).argmax())
    return _certain(winner, float(mean[winner]), number=len(outputs))


def _vote_each_label(probabilities: Tensor, outputs: Sequence[str]) -> Tensor:
    """Decide each label by itself; if the camps are equal, the mean probability of all experts decides."""
    for_it = probabilities >= THRESHOLD
    camps = [for_it, ~for_it]
    votes = torch.stack([camp.sum(0) for camp in camps])
    means = torch.stack([(probabilities * camp).sum(0) / camp.sum(0).clamp_min(1) for camp in camps])
    tied_for = probabilities.mean(0) >= THRESHOLD
    wins = torch.where(votes[0] == votes[1], tied_for, votes[0] > votes[1])
    return torch.where(wins, means[0], means[1])


class _Candidate(NamedTuple):
    votes: int
    confidence: float
    span: Span


def _vote_spans(probabilities: Tensor, outputs: Sequence[str]) -> Tensor:
    """Elect the spans of more than half of the experts, and those of just half if they are surer than the others."""
    logits = logits_of(find_kind("token_classification"), probabilities)
    paths = [best_legal_tags(member, outputs) for member in logits]
    indices = torch.tensor(paths, dtype=torch.long).view(*probabilities.shape[:2], 1)
    confidence = type_probabilities(probabilities, outputs).gather(2, indices).squeeze(2)  # [M, N]
    spans_of = [set(spans_from_tags([outputs[index] for index in path])) for path in paths]
    elected: list[_Candidate] = []
    for span in set().union(*spans_of):
        within = confidence[:, span.start : span.end].mean(1)
        voters = torch.tensor([span in spans for spans in spans_of])
        votes, sure = int(voters.sum()), float(within[voters].mean())
        tied = 2 * votes == len(spans_of) and sure > float(within[~voters].mean())
        if 2 * votes > len(spans_of) or tied:
            elected.append(_Candidate(votes, sure, span))
    outside = probabilities[..., outputs.index("O")].mean(0).tolist()
    rows = [_certain(outputs.index("O"), max(share, 0.5), number=len(outputs)) for share in outside]
    taken: set[int] = set()
    for entry in sorted(elected, key=lambda entry: (-entry.votes, -entry.confidence, entry.span)):
        words = range(entry.span.start, entry.span.end)
        if taken.isdisjoint(words):
            taken.update(words)
            begins, goes_on = (outputs.index(f"{prefix}-{entry.span.type}") for prefix in "BI")
            for word in words:
                tag, other = (begins, goes_on) if word == words.start else (goes_on, begins)
                rows[word] = _certain_of_type(tag, other, entry.confidence, number=len(outputs))
    return torch.stack(rows) if rows else probabilities.new_zeros(0, len(outputs))


def _certain(index: int, share: float, *, number: int) -> Tensor:
    """Return [number] probabilities: ``share`` at an index, the rest divided equally among the others.

    The share is raised until it is the largest: a tag may be best only together with its neighbours, and then have less
    than an even share.
    """
    share = max(share, 1.01 / number)
    row = torch.full((number,), (1 - share) / max(number - 1, 1))
    row[index] = share
    return row


def _certain_of_type(index: int, other: int, share: float, *, number: int) -> Tensor:
    """Return [number] probabilities: as ``_certain``, but 0 for the other tag of the same type."""
    row = torch.zeros(number)
    rest = [column for column in range(number) if column != other]
    row[rest] = _certain(rest.index(index), share, number=number - 1)
    return row


_VOTES: dict[str, Callable[[Tensor, Sequence[str]], Tensor]] = {
    "classification": _vote_label,
    "multi_label": _vote_each_label,
    "token_classification": _vote_spans,
}


def find_ensembles(
    model: SparseExpertModel, specs: Mapping[str, TaskSpec], names: Sequence[str], *, combine: str
) -> dict[str, Ensemble | None]:
    """Group tasks that ask the same question: tasks of one kind and language, with the same labels.

    Args:
        model: The model that answers the tasks.
        specs: All its task files.
        names: The tasks to answer.
        combine: See ``Combine``.

    Returns:
        First task of each group to the ensemble of the group: each expert of each task, with the head of the task. None
        if there is only one expert.

    Raises:
        ConfigError: If ``combine`` means nothing, a task was trained jointly, or no task has several experts.
    """
    if combine not in get_args(Combine):
        raise ConfigError(unknown_name("way to combine", combine, get_args(Combine)))
    groups: dict[Any, list[Member]] = {}
    for name in dict.fromkeys(names):
        spec, slot = specs[name], model.tasks[name]
        if slot.joint or slot.shared is not None:
            raise ConfigError(
                f"Task {name!r} was trained jointly, so its experts are combined already. Leave out --combine, or name "
                "other tasks."
            )
        if combine == "vote" and spec.kind not in _VOTES:
            raise ConfigError(
                f"There is no vote on tasks of the kind {spec.kind}, as {name!r} is. Take --combine mix or average."
            )
        question = (spec.kind, spec.language, frozenset(spec.label_names or []), spec.reads)
        groups.setdefault(question, []).extend(Member(name, expert) for expert in slot.experts)
    ensembles = {
        group[0].task: Ensemble(tuple(group), combine) if len(group) > 1 else None  # type: ignore[arg-type]
        for group in groups.values()
    }
    if not any(ensembles.values()):
        raise ConfigError(
            f"Nothing to combine: {', '.join(names)} {'has' if len(names) == 1 else 'have'} one expert each and no "
            "labels in common. Name several tasks with the same labels, e.g. --task a --task b."
        )
    return ensembles


def equal_routing(model: SparseExpertModel, experts: Sequence[str], *, number: int) -> Routing:
    """Send rows through several experts at once, with equal weights."""
    indices = torch.tensor([model.experts.index(name) for name in experts], device=model.device)
    return Routing(
        indices.expand(number, -1).contiguous(),
        torch.full((number, len(experts)), 1 / len(experts), device=model.device),
    )


@torch.no_grad()
def ensemble_logits(
    model: SparseExpertModel,
    specs: Mapping[str, TaskSpec],
    ensemble: Ensemble,
    encoded: EncodedTexts,
) -> list[Tensor]:
    """Compute the logits of an ensemble for each text.

    Args:
        model: In evaluation mode.
        specs: All its task files.
        ensemble: Experts and heads of the model.
        encoded: The texts, encoded for the first task of the ensemble.

    Returns:
        One float32 CPU tensor a text, (labels,) or (words, tags), in the order of the labels of the first task.
    """
    examples, num_rows, num_parts = encoded
    first = specs[ensemble.members[0].task]
    outputs = find_kind(first.kind).outputs(first.label_names or [])
    members: Sequence[Member] = ensemble.members
    routings = [
        Routing.one_hot([model.experts.index(expert)] * len(examples), device=model.device) for _, expert in members
    ]
    if ensemble.combine == "mix":
        routings = [equal_routing(model, ensemble.experts, number=len(examples))] * len(members)
    parts = []
    for member, own in zip(members, routings, strict=True):
        rows = row_logits(model, member.task, examples, num_rows=num_rows, num_parts=num_parts, routing=own)
        theirs = find_kind(first.kind).outputs(specs[member.task].label_names or [])
        order = [theirs.index(output) for output in outputs]
        parts.append([row[..., order] for row in rows])
    stacked = [torch.stack(rows) for rows in zip(*parts, strict=True)]
    if ensemble.combine == "mix":  # a mean of heads, which are linear
        return [rows.mean(0) for rows in stacked]
    if ensemble.combine == "average":
        return [average(rows, kind=first.kind) for rows in stacked]
    return [vote(rows, kind=first.kind, outputs=outputs) for rows in stacked]
