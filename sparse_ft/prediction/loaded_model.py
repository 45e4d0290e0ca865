"""Answer tasks for raw texts: a loaded model for applications, and a stream for files of any length."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.prediction.answering import Answering
from sparse_ft.prediction.ensembles import Ensemble, find_ensembles
from sparse_ft.prediction.requests import Request, RequestLike, Text, read_request
from sparse_ft.prediction.rules import Rules, load_rules
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.answers import Prediction
from sparse_ft.tasks.kinds.kind import probabilities_of
from sparse_ft.tasks.spec import TaskSpec

CHUNK = 256
"""Texts that are in memory at once when a stream is read; sorted by length among themselves."""


class LoadedModel:
    """A checkpoint ready to answer; one object may be used from several threads, which take turns.

    Args:
        checkpoint: What ``load_checkpoint`` gave.
        rules: Which choose an expert for each text in place of the checkpoint's gate.
    """

    def __init__(self, checkpoint: Checkpoint, *, rules: Rules | None = None) -> None:
        self.checkpoint, self.rules = checkpoint, rules
        self._answering = Answering(checkpoint)

    @property
    def encoder(self) -> Encoder:
        """Turns texts into rows of model input."""
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
        self, texts: Sequence[RequestLike], tasks: Sequence[str] | str | None = None, *, combine: str | None = None
    ) -> list[Prediction]:
        """Answer tasks for a list of texts.

        Args:
            texts: Raw texts, also empty; (text, text) for tasks on pairs, (text, question) for span extraction and
                (text, question or None, choices) for multiple choice. Or objects like the lines of a .jsonl file:
                ``{"text": …, "tasks": ["ner"], "metadata": {"channel": "mail"}}``, with tasks of their own, which all
                run in the same batches, and what rules ask for. A single string or object is a list of one.
            tasks: Names, or ``"all"``. None lets the rules or the gate choose an expert for each text, whose tasks are
                answered; without a gate, or with one that chooses for tokens, it means all.
            combine: ``mix``, ``average`` or ``vote``, see ``ensembles.Combine``: tasks with the same labels, and the
                several experts of a task, give one answer, under the name of the first task. None of ``tasks`` means
                all then.

        Returns:
            One prediction a text, in order. An answer does not depend on the other texts of the call.

        Raises:
            ConfigError: If a task is not in the checkpoint, the gate no longer fits the experts, or there is nothing to
                combine.
            DataError: If a task gets something else than it reads, e.g. one on pairs single texts.
        """
        answering, chosen = self._answering, tasks is None and combine is None
        rows = [read_request(text) for text in ([texts] if isinstance(texts, str | Mapping) else texts)]
        names = answering.task_names("all" if tasks is None else tasks)
        ensembles: dict[str, Ensemble] = {}
        if combine is not None:
            if own := next((row for row in rows if row.tasks is not None), None):
                raise ConfigError(
                    f"{str(own.text)[:60]!r} names its own tasks, {own.tasks!r}, and combine={combine!r} is about "
                    "tasks of all texts. Leave one of the two out."
                )
            groups = find_ensembles(self.checkpoint.model, self.tasks, names, combine=combine)
            names = [name for name, ensemble in groups.items() if ensemble is None]
            ensembles = {name: ensemble for name, ensemble in groups.items() if ensemble is not None}
        found: list[Prediction] = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            own_tasks = [row for row in chunk if row.tasks is not None]
            others = [row for row in chunk if row.tasks is None]
            alone = iter(answering.by_row(own_tasks) if own_tasks else [])
            rest: Iterator[Prediction] = iter(())
            if others and chosen:
                rest = iter(self._by_choice(others))
            elif others:
                rest = iter(answering.by_task([row.text for row in others], names, ensembles))
            found.extend(next(rest if row.tasks is None else alone) for row in chunk)
        return found

    def _by_choice(self, rows: Sequence[Request]) -> list[Prediction]:
        """Let rules, or else the gate, choose the tasks of each text; without either, all are answered."""
        texts = [row.text for row in rows]
        if self.rules is not None:
            return self._answering.by_rules(rows, self.rules)
        if self.checkpoint.model.sequence_gate is not None:
            return self._answering.by_gate(texts)
        return self._answering.by_task(texts, list(self.tasks), {})

    def stream(
        self, texts: Iterable[RequestLike], tasks: Sequence[str] | str | None = None, *, combine: str | None = None
    ) -> Iterator[Prediction]:
        """Answer tasks for any number of texts, holding no more than ``CHUNK`` of them in memory."""
        self._answering.task_names("all" if tasks is None else tasks)
        iterator = iter([texts] if isinstance(texts, str | Mapping) else texts)
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
        rows = self._answering.row_logits(name, [texts] if isinstance(texts, str) else list(texts))
        kind = find_kind(self.tasks[name].kind)
        if kind.level == "word" or kind.grouped:
            return rows
        return torch.stack(rows) if rows else torch.zeros(0, self.checkpoint.model.head(name).linear.out_features)

    def probabilities(self, texts: str | Sequence[Text], task: str) -> Tensor:
        """Compute the probability of every label of a task, float32 (texts, labels), in the order of its label names.

        Raises:
            ConfigError: If the task tags words; ``logits`` has what it says of each.
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


def load(
    path: str | Path, *, device: str = "auto", backbone: str | None = None, rules: str | Path | None = None
) -> LoadedModel:
    """Load a checkpoint for prediction.

    Args:
        path: Folder that ``train`` wrote.
        device: ``auto``, ``cpu``, ``cuda`` …
        backbone: Where the backbone is now, if not where the checkpoint says.
        rules: A YAML file with rules, see ``rules.Rule``, which choose the expert of a text in place of the gate.

    Raises:
        CheckpointError: If the folder is no complete checkpoint.
        BackboneError: If the backbone is missing or another one.
        ConfigError: If a rule is wrong or leads to an unknown expert.
    """
    read = None if rules is None else load_rules(rules)
    checkpoint = load_checkpoint(path, device=find_device(device), backbone=backbone)
    return LoadedModel(checkpoint, rules=None if read is None else Rules(checkpoint.model.routed, read))


def predict(
    checkpoint: str | Path | LoadedModel,
    texts: Sequence[RequestLike],
    *,
    tasks: Sequence[str] | str | None = None,
    combine: str | None = None,
    device: str = "auto",
    backbone: str | None = None,
) -> list[Prediction]:
    """Load a checkpoint and answer tasks for a list of texts; see ``load`` and ``LoadedModel.predict``."""
    model = checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint, device=device, backbone=backbone)
    return model.predict(texts, tasks, combine=combine)
