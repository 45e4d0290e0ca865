"""A loaded checkpoint that answers tasks for texts, in lists or in streams of any length."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.prediction.answering import Answering
from sparse_ft.prediction.ensembles import Ensemble, find_ensembles
from sparse_ft.prediction.explain import explain
from sparse_ft.prediction.requests import Request, RequestLike, Rows, Text, read_request, rows_of
from sparse_ft.prediction.routes import Route, check_familiarity
from sparse_ft.prediction.rules import Rules, load_rules
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.answers import Prediction
from sparse_ft.tasks.kinds.kind import probabilities_of
from sparse_ft.tasks.spec import TaskSpec

CHUNK = 256
"""Texts that are answered together, in batches of similar length; a stream holds no more in memory."""


class LoadedModel:
    """A checkpoint ready to answer; one object may be used from several threads, which take turns.

    Args:
        checkpoint: As ``load_checkpoint`` returns it.
        rules: Choose an expert for each text that names no task, in place of the gate of the checkpoint.
        min_familiarity: The share of each task's own texts that the gate turns away as unknown, 0 to 1; None takes that
            of the checkpoint. A text whose task is named is never unknown.

    Raises:
        ConfigError: If the checkpoint cannot measure the familiarity of a text.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, rules: Rules | None = None, min_familiarity: float | None = None
    ) -> None:
        if min_familiarity is not None:
            check_familiarity(checkpoint.model, min_familiarity, route="gate" if rules is None else "rules")
        self.checkpoint, self.rules, self.min_familiarity = checkpoint, rules, min_familiarity
        self._answering = Answering(checkpoint)

    @property
    def encoder(self) -> Encoder:
        """The encoder that turns texts into rows of model input."""
        return self._answering.encoder

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Task files with all label names, by task name."""
        return self.checkpoint.tasks

    def to(self, device: str) -> "LoadedModel":
        """Move to a device, ``auto``, ``cpu``, ``cuda`` …, once no other thread computes."""
        with self._answering.lock:
            self.checkpoint.model.to(find_device(device))
        return self

    def __call__(self, texts: RequestLike | Sequence[RequestLike]) -> Prediction | list[Prediction]:
        """Answer one text, or each of a list; the gate decides which tasks, as in ``predict``."""
        if isinstance(texts, str | tuple | Mapping):
            return self.predict([texts])[0]
        return self.predict(texts)

    def predict(
        self, texts: Rows, tasks: Sequence[str] | str | None = None, *, combine: str | None = None
    ) -> list[Prediction]:
        """Answer tasks for a list of texts.

        Args:
            texts: Raw texts, also empty; (text, text) for tasks on pairs, (text, question) for span extraction and
                (text, question or None, choices) for multiple choice. Or objects like the lines of a .jsonl file:
                ``{"text": …, "tasks": ["ner"], "metadata": {"channel": "mail"}}``, with tasks of this text, which run
                in common batches, metadata for rules, and fields such as an id, which the answer repeats. A single
                string or object is a list of one. Of a ``pandas.DataFrame``, the column ``text`` holds the texts.
            tasks: Names, or ``"all"``. None lets the rules or the gate choose an expert for each text, whose tasks are
                answered; without a gate, or with one that chooses for tokens, None means all.
            combine: ``mix``, ``average`` or ``vote``, see ``ensembles.Combine``: tasks with the same labels, and the
                several experts of a task, give one answer, under the name of the first task. ``tasks=None`` then means
                all.

        Returns:
            One prediction a text, in order. An answer does not depend on the other texts of the call.

        Raises:
            ConfigError: If a task is not in the checkpoint, the gate no longer fits the experts, or there is nothing to
                combine.
            DataError: If a task gets texts of another form than it reads, e.g. single texts in place of pairs.
        """
        answering = self._answering
        requests = list(map(read_request, rows_of(texts)))
        names = answering.task_names("all" if tasks is None else tasks)
        ensembles: dict[str, Ensemble] = {}
        if combine is not None:
            _check_no_tasks(requests, combine)
            groups = find_ensembles(self.checkpoint.model, self.tasks, names, combine=combine)
            names = [name for name, ensemble in groups.items() if ensemble is None]
            ensembles = {name: ensemble for name, ensemble in groups.items() if ensemble is not None}
        route = self._route if tasks is None and combine is None else None
        predictions: list[Prediction] = []
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            answers = answering.answer(chunk, names=names, ensembles=ensembles, route=route)
            predictions.extend(
                replace(answer, fields=request.fields) for answer, request in zip(answers, chunk, strict=True)
            )
        return predictions

    def explain(self, tasks: Sequence[str] | str = "all") -> str:
        """Return a table of the blocks that the answers to one text share, and their passes through the backbone.

        Args:
            tasks: Names, or ``"all"``. A gate that chooses the tasks reads the bare backbone besides.
        """
        return explain(self.checkpoint.model, self.tasks, self._answering.task_names(tasks))

    @property
    def _route(self) -> Route | None:
        """The route of texts that name no task: rules, or a gate that reads whole texts; None answers all tasks."""
        model = self.checkpoint.model
        if self.rules is not None:
            return Route("rules", model, chooser=self.rules)
        return None if model.sequence_gate is None else Route("gate", model, min_familiarity=self.min_familiarity)

    def stream(
        self, texts: Iterable[RequestLike], tasks: Sequence[str] | str | None = None, *, combine: str | None = None
    ) -> Iterator[Prediction]:
        """Answer tasks for any number of texts, with no more than ``CHUNK`` of them in memory; see ``predict``."""
        self._answering.task_names("all" if tasks is None else tasks)
        iterator = iter(rows_of(texts))
        while chunk := list(itertools.islice(iterator, CHUNK)):
            yield from self.predict(chunk, tasks, combine=combine)

    def logits(self, texts: str | Sequence[Text], task: str) -> Tensor | list[Tensor]:
        """Compute the raw outputs of one task.

        Args:
            texts: Raw texts; a single string is a list of one.
            task: A task of the checkpoint.

        Returns:
            Float32 (texts, labels); for tagging and span extraction a list of (words, outputs) over the words of
            ``words.split_words``; for multiple choice a list of (choices, 1).
        """
        (name,) = self._answering.task_names([task])
        rows = self._answering.logits(name, [read_request(text).text for text in rows_of(texts)])
        kind = find_kind(self.tasks[name].kind)
        if kind.level == "word" or kind.grouped:
            return rows
        return torch.stack(rows) if rows else torch.zeros(0, self.checkpoint.model.head(name).linear.out_features)

    def labels(self, task: str) -> list[str]:
        """Name the columns of ``logits`` and ``probabilities`` of a task: its labels, or the tags of words.

        Raises:
            ConfigError: If the task is not in the checkpoint.
        """
        (name,) = self._answering.task_names([task])
        return find_kind(self.tasks[name].kind).outputs(self.tasks[name].label_names or [])

    def probabilities(self, texts: str | Sequence[Text], task: str) -> Tensor:
        """Compute the probability of every label of a task, float32 (texts, labels), in the order of ``labels``.

        Raises:
            ConfigError: If the task is not in the checkpoint, or is about words or choices; ``logits`` returns the
                outputs of each.
        """
        (name,) = self._answering.task_names([task])
        kind = find_kind(self.tasks[name].kind)
        logits = self.logits(texts, name)
        if isinstance(logits, list):
            parts = "words" if kind.level == "word" else "choices"
            raise ConfigError(
                f"Task {name!r} is about {parts} and has no probabilities of a text. Ask logits for those of {parts}."
            )
        return probabilities_of(kind, logits)


def _check_no_tasks(requests: Sequence[Request], combine: str) -> None:
    """Refuse requests that name tasks of their own beside ``combine``."""
    for request in requests:
        if request.tasks is not None:
            raise ConfigError(
                f"{str(request.text)[:60]!r} names its own tasks, {request.tasks!r}, and combine={combine!r} is about "
                "tasks of all texts. Leave one of the two out."
            )


def load(
    path: str | Path,
    *,
    device: str = "auto",
    backbone: str | None = None,
    rules: str | Path | None = None,
    min_familiarity: float | None = None,
) -> LoadedModel:
    """Load a checkpoint for prediction.

    Args:
        path: Folder that ``train`` wrote.
        device: ``auto``, ``cpu``, ``cuda`` …
        backbone: Path of the backbone, if not that in the checkpoint.
        rules: A YAML file with rules, see ``rules.Rule``, which choose the expert of a text in place of the gate.
        min_familiarity: The share of each task's own texts that the gate turns away as unknown, 0 to 1; None takes that
            of the checkpoint, 0.005 by default.

    Raises:
        CheckpointError: If the folder is no complete checkpoint.
        BackboneError: If the backbone is missing or another one.
        ConfigError: If a rule is wrong or leads to an unknown expert, or the checkpoint cannot measure the familiarity
            of a text.
    """
    parsed = None if rules is None else load_rules(rules)
    checkpoint = load_checkpoint(path, device=find_device(device), backbone=backbone)
    chooser = None if parsed is None else Rules(checkpoint.model.routed, parsed)
    return LoadedModel(checkpoint, rules=chooser, min_familiarity=min_familiarity)


def predict(
    checkpoint: str | Path | LoadedModel,
    texts: Rows,
    *,
    tasks: Sequence[str] | str | None = None,
    combine: str | None = None,
    device: str = "auto",
    backbone: str | None = None,
    min_familiarity: float | None = None,
) -> list[Prediction]:
    """Load a checkpoint and answer tasks for a list of texts; see ``load`` and ``LoadedModel.predict``."""
    if not isinstance(checkpoint, LoadedModel):
        checkpoint = load(checkpoint, device=device, backbone=backbone, min_familiarity=min_familiarity)
    elif min_familiarity is not None:
        raise ConfigError(f"min_familiarity is {min_familiarity!r}, and the model is loaded. Give it to load().")
    return checkpoint.predict(texts, tasks, combine=combine)
