"""Answer tasks for raw texts: a loaded model for applications, and a stream for files of any length."""

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ft.answers import Answer, Prediction
from sparse_ft.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.devices import find_device
from sparse_ft.encoding import Encoder, Example
from sparse_ft.ensembles import Ensemble, ensemble_logits, find_ensembles
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.gates import SequenceGate
from sparse_ft.inference import entering, leaving, row_logits, stacked_means, text_routing
from sparse_ft.kinds import find_kind
from sparse_ft.routing import Routing
from sparse_ft.tasks import TaskSpec

CHUNK = 256
"""Texts that are in memory at once when a stream is read; sorted by length among themselves."""

_Key = tuple[int, ...]

Text = str | tuple[str, str] | tuple[str, str | None, Sequence[str]]
"""A text; a pair of texts for tasks on pairs, or a text and a question about it; or a text, a question or None, and
choices, for multiple choice."""


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

    def to(self, device: str) -> "LoadedModel":
        """Move to a device, ``auto``, ``cpu``, ``cuda`` …, once no other thread computes."""
        with self._lock:
            self.checkpoint.model.to(find_device(device))
        return self

    def __call__(self, texts: Text | Sequence[Text]) -> Prediction | list[Prediction]:
        """Answer one text, or each of a list; the gate decides which tasks, as in ``predict``."""
        if isinstance(texts, (str, tuple)):
            return self.predict([texts])[0]
        return self.predict(texts)

    def predict(
        self, texts: Sequence[Text], tasks: Sequence[str] | str | None = None, *, combine: str | None = None
    ) -> list[Prediction]:
        """Answer tasks for a list of texts.

        Args:
            texts: Raw texts, also empty; (text, text) for tasks on pairs, (text, question) for span extraction and
                (text, question or None, choices) for multiple choice. A single string is a list of one.
            tasks: Names, or ``"all"``. None lets the gate choose an expert for each text, whose tasks are answered;
                without a gate, or with one that chooses for tokens, it means all.
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
        texts = [texts] if isinstance(texts, str) else texts
        by_gate = tasks is None and combine is None and isinstance(self.checkpoint.model.gate, SequenceGate)
        names = self._task_names("all" if tasks is None else tasks)
        ensembles: dict[str, Ensemble] = {}
        if combine is not None:
            groups = find_ensembles(self.checkpoint.model, self.tasks, names, combine=combine)
            names = [name for name, ensemble in groups.items() if ensemble is None]
            ensembles = {name: ensemble for name, ensemble in groups.items() if ensemble is not None}
        found: list[Prediction] = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            found.extend(self._by_gate(chunk) if by_gate else self._by_task(chunk, names, ensembles))
        return found

    def _by_task(
        self, texts: Sequence[Text], names: Sequence[str], ensembles: Mapping[str, Ensemble]
    ) -> list[Prediction]:
        """Answer these tasks for every text, each by its own experts, and others by ensembles."""
        model = self.checkpoint.model
        for name in (*names, *ensembles):
            _columns(self.tasks[name], texts)  # says what is wrong with the texts
        alone = [name for name in names if not model.tasks[name].mixed]
        trunk = self._shared(texts) if len(alone) > 1 and self._keeps_trunk else {}
        shared = dict.fromkeys(alone, trunk)
        single = [name for name in alone if not model.tasks[name].gated]
        routings = [{model.tasks[name].experts[0]: 1.0 for name in single} for _ in texts]
        weights = [self._domain_weights(texts, name) for name in alone if name not in single]
        for group in self._mixed_groups(names):
            found, own = self._mixed(texts, group[0])
            shared.update(dict.fromkeys(group, found))
            weights.append(own)
        for given in weights:
            for routing, row in zip(routings, given.tolist(), strict=True):
                routing.update({name: weight for name, weight in zip(model.experts.names, row, strict=True) if weight})
        answers = {name: self._answers(name, texts, shared=shared[name]) for name in names}
        for name, ensemble in ensembles.items():
            answers[name] = self._answers(name, texts, shared={}, ensemble=ensemble)
            for routing in routings:
                routing.update(dict.fromkeys(ensemble.experts, 1 / len(ensemble.experts)))
        return [
            _prediction(text, {name: found[place] for name, found in answers.items()}, routings[place])
            for place, text in enumerate(texts)
        ]

    def _mixed_groups(self, names: Sequence[str]) -> list[list[str]]:
        """Return the tasks that one gated pass can answer, together: those whose rows look the same to the experts."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            slot = self.checkpoint.model.tasks[name]
            if slot.mixed:
                groups.setdefault((slot.shared, self._sees_shapes(name)), []).append(name)
        return list(groups.values())

    def _sees_shapes(self, task: str) -> bool:
        """Whether the experts that a task mixes see how its words are written."""
        model = self.checkpoint.model
        slot = model.tasks[task]
        return slot.mixed and slot.level == "word" and bool(model.word_shapes.blocks_of(None))

    def _mixed(self, texts: Sequence[Text], task: str) -> tuple[dict[_Key, Example], Tensor]:
        """Run texts through the experts that the gate mixes, for all tasks that are mixed like this one.

        Returns:
            Examples with what leaves the backbone, and the mean weight of each expert, [texts, experts].
        """
        model = self.checkpoint.model
        with self._lock:
            examples, usage = leaving(model, task, self._encoded(task, texts))
        found = {_key(example, shapes=self._sees_shapes(task)): example for example in examples}
        rows = torch.tensor([example.row for example in examples], dtype=torch.long)
        return found, _mean_by_text(usage, rows, len(texts))

    def _domain_weights(self, texts: Sequence[Text], task: str) -> Tensor:
        """Return the weights that the gate gives the several experts of a task, [texts, experts]."""
        model = self.checkpoint.model
        with self._lock:
            examples = self._encoded(task, texts)
            usage = text_routing(model, examples, task=task).spread(len(model.experts.names)).cpu()
        return _mean_by_text(usage, torch.tensor([example.row for example in examples]), len(texts))

    def _by_gate(self, texts: Sequence[Text]) -> list[Prediction]:
        """Let the gate choose an expert for every text, and answer the tasks of that expert."""
        model = self.checkpoint.model
        gate = model.text_gate()
        with self._lock, torch.no_grad():
            examples = entering(model, self._plain(texts), block=gate.block, means=True)
            tokens, unfit = [example.input_ids for example in examples], self._unfit(texts, gate)
            if texts and len(unfit) == len(gate.names):
                raise DataError(
                    f"No task of this checkpoint reads {_FORMS[_form(texts[0])]}, as {texts[0]!r} is. Its tasks read "
                    f"{' or '.join(dict.fromkeys(_FORMS[spec.reads] for spec in self.tasks.values()))}."
                )
            decided = gate.decide(stacked_means(examples).to(model.device), tokens, excluded=unfit)
        reusable = self._keeps_trunk and gate.block == model.first_block
        trunk = {_key(example): example for example in examples} if reusable else {}
        names = [name for name in model.tasks if self.tasks[name].reads == _form(texts[0])]
        shared = dict.fromkeys(names, trunk)
        for group in self._mixed_groups(names):
            shared.update(dict.fromkeys(group, self._mixed(texts, group[0])[0]))
        assert decided.logits is not None
        assert decided.experts is not None
        routing = model.placed(decided)
        probabilities = decided.logits.softmax(-1).tolist()
        best = [
            None if not weights[0] else gate.names[experts[0]]
            for experts, weights in zip(decided.experts.tolist(), decided.weights.tolist(), strict=True)
        ]
        answers: list[dict[str, Answer]] = [{} for _ in texts]
        for name in names:
            slot = model.tasks[name]
            places = [place for place, expert in enumerate(best) if expert in slot.experts]
            own = None if slot.mixed else routing.take(places)
            found = self._answers(name, [texts[place] for place in places], shared=shared[name], routing=own)
            for place, answer in zip(places, found, strict=True):
                answers[place][name] = answer
        return [
            _prediction(text, answer, dict(zip(gate.names, shares, strict=True)), unknown=expert is None)
            for text, answer, shares, expert in zip(texts, answers, probabilities, best, strict=True)
        ]

    def _unfit(self, texts: Sequence[Text], gate: SequenceGate) -> list[int]:
        """Return the places of the gate's experts that serve no task on what the texts are."""
        model, form = self.checkpoint.model, _form(texts[0])
        slots = [slot for name, slot in model.tasks.items() if self.tasks[name].reads == form]
        fit = {expert for slot in slots for expert in slot.experts}
        return [place for place, name in enumerate(gate.names) if name not in fit]

    @property
    def _keeps_trunk(self) -> bool:
        """Whether what lies below the experts can be computed once for several tasks."""
        model = self.checkpoint.model
        return model.first_block > 0 and model.backbone.family.keeps_trunk

    def _plain(self, texts: Sequence[Text]) -> list[Example]:
        """Encode texts or pairs without regard to a task; choices are not seen."""
        if len({_form(text) for text in texts}) > 1:
            raise DataError("Some of the texts are pairs and some are not, or have choices. Ask for them apart.")
        pairs = [text[1] or "" for text in texts if not isinstance(text, str)]
        return self.encoder.texts([text if isinstance(text, str) else text[0] for text in texts], pairs or None)

    def _shared(self, texts: Sequence[Text]) -> dict[_Key, Example]:
        """Run the blocks below the experts once for all tasks."""
        with self._lock:
            return {_key(row): row for row in entering(self.checkpoint.model, self._plain(texts))}

    def stream(
        self, texts: Iterable[Text], tasks: Sequence[str] | str | None = None, *, combine: str | None = None
    ) -> Iterator[Prediction]:
        """Answer tasks for any number of texts, holding no more than ``CHUNK`` of them in memory."""
        self._task_names("all" if tasks is None else tasks)
        iterator = iter(texts)
        while chunk := list(itertools.islice(iterator, CHUNK)):
            yield from self.predict(chunk, tasks, combine=combine)

    def logits(self, texts: Sequence[Text], task: str) -> Tensor | list[Tensor]:
        """Compute the raw outputs of one task.

        Args:
            texts: Raw texts.
            task: A task of the checkpoint.

        Returns:
            Float32 (texts, labels); for tagging and span extraction a list of (words, outputs) over the words of
            ``words.split_words``; for multiple choice a list of (choices, 1).
        """
        (name,) = self._task_names([task])
        rows = self._row_logits(name, texts)
        kind = find_kind(self.tasks[name].kind)
        if kind.level == "word" or kind.by_row:
            return rows
        return torch.stack(rows) if rows else torch.zeros(0, self.checkpoint.model.head(name).linear.out_features)

    def probabilities(self, texts: Sequence[Text], task: str) -> Tensor:
        """Compute the probability of every label of a task, float32 (texts, labels), in the order of its label names.

        Raises:
            ConfigError: If the task tags words; ``logits`` has what it says of each.
        """
        (name,) = self._task_names([task])
        kind = find_kind(self.tasks[name].kind)
        logits = self.logits(texts, name)
        if isinstance(logits, list):
            raise ConfigError(
                f"Task {name!r} tags words and has no probabilities of a text. Ask logits for those of words."
            )
        return kind.probabilities(logits)

    def _task_names(self, tasks: Sequence[str] | str) -> list[str]:
        if tasks == "all":
            return list(self.tasks)
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        for name in names:
            self.checkpoint.model.head(name)
        if not names:
            raise ConfigError('No task is given. Name some of the checkpoint, or write "all".')
        return names

    def _answers(
        self,
        task: str,
        texts: Sequence[Text],
        *,
        shared: Mapping[_Key, Example],
        routing: Routing | None = None,
        ensemble: Ensemble | None = None,
    ) -> list[Answer]:
        spec = self.tasks[task]
        kind, labels = find_kind(spec.kind), spec.label_names or []
        own = [text[2] if len(text) == 3 and not isinstance(text, str) else labels for text in texts]
        rows = self._row_logits(task, texts, shared=shared, routing=routing, ensemble=ensemble)
        return [
            kind.answer(logits, text=text if isinstance(text, str) else text[0], labels=names, language=spec.language)
            for text, names, logits in zip(texts, own, rows, strict=True)
        ]

    def _encoded(self, task: str, texts: Sequence[Text]) -> list[Example]:
        spec = self.tasks[task]
        columns = _columns(spec, texts)
        return find_kind(spec.kind).encode(
            columns, encoder=self.encoder, labels=spec.label_names or [], language=spec.language
        )

    def _row_logits(
        self,
        task: str,
        texts: Sequence[Text],
        *,
        shared: Mapping[_Key, Example] | None = None,
        routing: Routing | None = None,
        ensemble: Ensemble | None = None,
    ) -> list[Tensor]:
        spec = self.tasks[task]
        kind = find_kind(spec.kind)
        columns = _columns(spec, texts)
        num_parts = kind.parts(columns, language=spec.language)
        with self._lock:  # over the encoding, too: a tokenizer keeps its truncation settings in itself
            examples = self._encoded(task, texts)
            if ensemble is not None:
                return ensemble_logits(
                    self.checkpoint.model, self.tasks, ensemble, examples, num_rows=len(texts), num_parts=num_parts
                )
            if shared:
                shapes = self._sees_shapes(task)
                kept = [shared.get(_key(example, shapes=shapes)) for example in examples]
                examples = [
                    replace(example, trunk=twin.trunk, hidden=twin.hidden) if twin is not None else example
                    for example, twin in zip(examples, kept, strict=True)
                ]
            own = None if routing is None else routing.take([example.row for example in examples])
            return row_logits(
                self.checkpoint.model, task, examples, num_rows=len(texts), num_parts=num_parts, routing=own
            )


def _key(example: Example, *, shapes: bool = False) -> _Key:
    """Tell examples apart by what the backbone sees of them, or with their word shapes, which experts may see."""
    return (*example.input_ids, -1, *(example.token_type_ids or ()), -2, *(example.word_shapes if shapes else ()))


def _mean_by_text(usage: Tensor, rows: Tensor, number: int) -> Tensor:
    """Average [examples, experts] over the examples of each text, [number, experts]; 0 for a text without any."""
    sums = torch.zeros(number, usage.shape[1]).index_add(0, rows, usage)
    return sums / rows.bincount(minlength=number).clamp_min(1).unsqueeze(1)


def _prediction(
    text: Text, tasks: dict[str, Answer], routing: dict[str, float], *, unknown: bool = False
) -> Prediction:
    first, second, choices = (text, None, None) if isinstance(text, str) else (*text, None)[:3]
    return Prediction(first, tasks, routing, second, unknown, choices)


_FORMS = {"text": "one text a row", "pair": "two texts a row", "choices": "choices beside one text or two"}


def _form(text: Text) -> str:
    """Tell what a row is, as ``TaskSpec.reads`` says it."""
    for part in (text,) if isinstance(text, str) else text if isinstance(text, tuple) else ():
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"The text {text!r} is no Unicode: {error}. Read it as UTF-8.") from error
    if isinstance(text, str):
        return "text"
    if isinstance(text, tuple) and len(text) == 2:
        return "pair"
    if isinstance(text, tuple) and len(text) == 3 and not isinstance(text[2], str) and len(text[2]):
        return "choices"
    raise DataError(
        f"Expected a text or a pair of texts, got {type(text).__name__}: {text!r}. For multiple choice give "
        "(text, question or None, [choice, …])."
    )


def _columns(spec: TaskSpec, texts: Sequence[Text]) -> dict[str, list[Any]]:
    """Sort texts into the columns that the task reads."""
    for text in texts:
        form = _form(text)
        if form != spec.reads:
            raise DataError(
                f"Task {spec.name!r} reads {_FORMS[spec.reads]}, got {_FORMS[form].split()[0]}: {text!r}. "
                "Ask only tasks that read the same (--task, or tasks=[…])."
            )
    if spec.reads == "text":
        return {"text": list(texts)}
    columns = zip(*texts, strict=True) if texts else ([], [], [])
    return dict(zip(("text", "text_pair", "choices"), map(list, columns), strict=False))


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
    tasks: Sequence[str] | str | None = None,
    combine: str | None = None,
    device: str = "auto",
    backbone: str | None = None,
) -> list[Prediction]:
    """Load a checkpoint and answer tasks for a list of texts; see ``load`` and ``LoadedModel.predict``."""
    model = checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint, device=device, backbone=backbone)
    return model.predict(texts, tasks, combine=combine)
