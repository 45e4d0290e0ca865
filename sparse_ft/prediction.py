"""Answer tasks for raw texts: a loaded model for applications, and a stream for files of any length."""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ft.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.devices import find_device
from sparse_ft.encoding import Encoder
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.inference import row_logits
from sparse_ft.kinds import find_kind
from sparse_ft.tasks import TaskSpec
from sparse_ft.words import split_words

CHUNK = 256
"""Texts that are in memory at once when a stream is read; sorted by length among themselves."""

Text = str | tuple[str, str]
"""A text, or a pair of texts for tasks on pairs."""


@dataclass(frozen=True)
class Prediction:
    """The answers to one text."""

    text: str
    tasks: dict[str, dict[str, Any]]
    """Task to its answer: label and score, labels, or entities."""
    routing: dict[str, float]
    """Weight of each expert that was used."""
    text_pair: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a line of ``predict --json`` holds."""
        pair = {} if self.text_pair is None else {"text_pair": self.text_pair}
        return {"text": self.text, **pair, "tasks": self.tasks, "routing": self.routing}


class LoadedModel:
    """A checkpoint ready to answer; one object may be used from several threads, which take turns.

    Args:
        checkpoint: What ``load_checkpoint`` gave.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.encoder = Encoder(checkpoint.model.backbone, max_length=checkpoint.config.data.max_length)
        self._lock = threading.Lock()

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Task files with all label names, by task name."""
        return self.checkpoint.tasks

    def __call__(self, texts: Text | Sequence[Text]) -> Prediction | list[Prediction]:
        """Answer every task for one text, or for each of a list."""
        if isinstance(texts, (str, tuple)):
            return self.predict([texts])[0]
        return self.predict(texts)

    def predict(self, texts: Sequence[Text], tasks: Sequence[str] | str = "all") -> list[Prediction]:
        """Answer tasks for a list of texts.

        Args:
            texts: Raw texts, also empty; (text, text) for tasks on pairs. A single string is a list of one.
            tasks: Names, or ``"all"``.

        Returns:
            One prediction a text, in order. An answer does not depend on the other texts of the call.

        Raises:
            ConfigError: If a task is not in the checkpoint.
            DataError: If a task on pairs gets single texts, or the other way round.
        """
        texts = [texts] if isinstance(texts, str) else texts
        names = self._task_names(tasks)
        answers = {name: self._answers(name, texts) for name in names}
        routing = {self.checkpoint.model.tasks[name].expert: 1.0 for name in names}
        return [
            Prediction(
                text if isinstance(text, str) else text[0],
                {name: answers[name][place] for name in names},
                routing,
                None if isinstance(text, str) else text[1],
            )
            for place, text in enumerate(texts)
        ]

    def stream(self, texts: Iterable[Text], tasks: Sequence[str] | str = "all") -> Iterator[Prediction]:
        """Answer tasks for any number of texts, holding no more than ``CHUNK`` of them in memory."""
        self._task_names(tasks)
        iterator = iter(texts)
        while chunk := list(itertools.islice(iterator, CHUNK)):
            yield from self.predict(chunk, tasks)

    def logits(self, texts: Sequence[Text], task: str) -> Tensor | list[Tensor]:
        """Compute the raw outputs of one task.

        Args:
            texts: Raw texts.
            task: A task of the checkpoint.

        Returns:
            Float32 (texts, labels); for tagging a list of (words, tags) over the words of ``words.split_words``.
        """
        (name,) = self._task_names([task])
        rows = self._row_logits(name, texts)
        if find_kind(self.tasks[name].kind).level == "word":
            return rows
        return torch.stack(rows) if rows else torch.zeros(0, self.checkpoint.model.head(name).linear.out_features)

    def _task_names(self, tasks: Sequence[str] | str) -> list[str]:
        if tasks == "all":
            return list(self.tasks)
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        for name in names:
            self.checkpoint.model.head(name)
        if not names:
            raise ConfigError('No task is given. Name some of the checkpoint, or write "all".')
        return names

    def _answers(self, task: str, texts: Sequence[Text]) -> list[dict[str, Any]]:
        spec = self.tasks[task]
        kind, labels = find_kind(spec.kind), spec.label_names or []
        return [
            kind.answer(logits, text=text if isinstance(text, str) else text[0], labels=labels, language=spec.language)
            for text, logits in zip(texts, self._row_logits(task, texts), strict=True)
        ]

    def _row_logits(self, task: str, texts: Sequence[Text]) -> list[Tensor]:
        spec = self.tasks[task]
        kind = find_kind(spec.kind)
        columns = _columns(spec, texts)
        num_words = None
        if kind.level == "word":
            num_words = [len(split_words(text, spec.language)) for text in columns["text"]]
        with self._lock:  # over the encoding, too: a tokenizer keeps its truncation settings in itself
            examples = kind.encode(columns, encoder=self.encoder, labels=spec.label_names or [], language=spec.language)
            return row_logits(self.checkpoint.model, task, examples, num_rows=len(texts), num_words=num_words)


def _columns(spec: TaskSpec, texts: Sequence[Text]) -> dict[str, list[str]]:
    """Sort texts into the columns that the task reads."""
    wants_pairs = "text_pair" in spec.columns
    for text in texts:
        if not isinstance(text, str) and not (isinstance(text, tuple) and len(text) == 2):
            raise DataError(f"Expected a text or a pair of texts, got {type(text).__name__}: {text!r}.")
        if isinstance(text, tuple) != wants_pairs:
            wanted, given = ("two texts a row", "one") if wants_pairs else ("one text a row", "two")
            raise DataError(
                f"Task {spec.name!r} reads {wanted}, got {given}: {text!r}. "
                "Ask only tasks that read the same (--task, or tasks=[…])."
            )
    if wants_pairs:
        return {"text": [text[0] for text in texts], "text_pair": [text[1] for text in texts]}
    return {"text": [text for text in texts if isinstance(text, str)]}


def load(path: str | Path, *, device: str = "auto", backbone: str | None = None) -> LoadedModel:
    """Load a checkpoint for prediction.

    Args:
        path: Folder that ``train`` wrote.
        device: ``auto``, ``cpu``, ``cuda`` …
        backbone: Where the backbone is now, if not where the checkpoint says.

    Raises:
        CheckpointError: If the folder is no complete checkpoint.
        BackboneError: If the backbone is missing or another one.
    """
    return LoadedModel(load_checkpoint(path, device=find_device(device), backbone=backbone))


def predict(
    checkpoint: str | Path | LoadedModel,
    texts: Sequence[Text],
    *,
    tasks: Sequence[str] | str = "all",
    device: str = "auto",
) -> list[Prediction]:
    """Answer tasks for a list of texts; see ``LoadedModel.predict``."""
    model = checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint, device=device)
    return model.predict(texts, tasks)
