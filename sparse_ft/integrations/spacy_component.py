"""The component ``sparse_ft`` of spaCy pipelines; needs the extra ``spacy``.

``nlp.add_pipe("sparse_ft", config={"checkpoint": "runs/all"})`` sets ``doc.cats`` (``"task:label"`` to probability, for
every label of the tasks on texts) and ``doc.ents`` (from the tasks that tag words). spaCy finds the component without
an import once sparse-ft is installed.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from spacy.language import Language
from spacy.tokens import Doc, Span
from spacy.util import filter_spans

from sparse_ft.checkpoint.folders import write_json
from sparse_ft.documents import parse_json, read_json_object
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.json_output import json_text
from sparse_ft.paths import user_path
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.kinds.answers import Entity

ALIGNMENTS = ("strict", "contract", "expand")
_LOADED = ("loaded", "names")
"""Attributes that are read from the checkpoint when they are first used."""


class SparseFTComponent:
    """Answers tasks of a checkpoint for docs.

    Args:
        name: Name in the spaCy pipeline.
        checkpoint: Folder of the checkpoint, serialised as an absolute path. A missing folder is reported at the first
            doc, because a pipeline that is read from disk may name another.
        tasks: Names, or ``"all"`` for all tasks that read one text.
        device: ``auto``, ``cpu``, ``cuda`` …
        alignment: For an entity that begins or ends inside a token of spaCy: ``expand`` takes the tokens that it
            touches, ``contract`` the tokens that it covers, ``strict`` drops it.
        backbone: Where the backbone is now, if not where the checkpoint says; may be empty; serialised, too.

    Raises:
        ConfigError: If a name is unknown.
        CheckpointError: If the folder is no complete checkpoint.

    ``spacy.load(path, config=…)`` overrides the serialised settings that it changes.
    """

    def __init__(
        self, name: str, *, checkpoint: str, tasks: Sequence[str] | str, device: str, alignment: str, backbone: str
    ) -> None:
        if alignment not in ALIGNMENTS:
            raise ConfigError(unknown_name("alignment", alignment, ALIGNMENTS))
        if not checkpoint:
            raise ConfigError(
                'The component sparse_ft names no checkpoint. Add config={"checkpoint": FOLDER} to add_pipe.'
            )
        self.name, self.device = name, device
        self.given: dict[str, Any] = {
            "checkpoint": checkpoint,
            "tasks": tasks,
            "alignment": alignment,
            "backbone": backbone,
        }
        self.settings = {**self.given, "checkpoint": str(user_path(checkpoint).absolute())}
        if Path(self.settings["checkpoint"]).exists():
            self.names  # noqa: B018  # reports unknown names at once

    def __call__(self, doc: Doc) -> Doc:
        """Set the categories and entities of one doc."""
        return next(self.pipe([doc], batch_size=1))

    def pipe(self, docs: Iterable[Doc], *, batch_size: int = 128) -> Iterator[Doc]:
        """Set the categories and entities of docs, ``batch_size`` at a time."""
        iterator = iter(docs)
        while chunk := list(itertools.islice(iterator, batch_size)):
            self._annotate(chunk)
            yield from chunk

    def to_disk(self, path: str | Path, *, exclude: Sequence[str] = ()) -> None:
        """Write the settings; the checkpoint stays where it is."""
        write_json(Path(path) / "sparse_ft.json", self._state())

    def from_disk(self, path: str | Path, *, exclude: Sequence[str] = ()) -> "SparseFTComponent":
        """Read the settings that ``to_disk`` wrote; another checkpoint is loaded at the next doc."""
        self._change(read_json_object(Path(path) / "sparse_ft.json"))
        return self

    def to_bytes(self, *, exclude: Sequence[str] = ()) -> bytes:
        """Return the settings as bytes."""
        return json_text(self._state()).encode()

    def from_bytes(self, content: bytes, *, exclude: Sequence[str] = ()) -> "SparseFTComponent":
        """Read the settings that ``to_bytes`` returned."""
        self._change(parse_json(content.decode(), "The settings of the component"))
        return self

    def _state(self) -> dict[str, Any]:
        return {"settings": self.settings, "given": self.given}

    def _change(self, state: dict[str, Any]) -> None:
        """Take the serialised settings, except those that the present config changes."""
        written = state.get("settings", state)  # the first versions wrote the settings alone
        given = state.get("given", self.given)
        before = self.settings
        self.settings = {
            key: value if self.given[key] == given.get(key) else before[key] for key, value in written.items()
        }
        if self.settings != before:
            for name in _LOADED:
                self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model, which a copy, or another process, loads at its next doc."""
        return {key: value for key, value in self.__dict__.items() if key not in _LOADED}

    @cached_property
    def loaded(self) -> LoadedModel:  # not `model`, which spaCy looks for in every component
        """The loaded checkpoint."""
        return load(self.settings["checkpoint"], device=self.device, backbone=self.settings.get("backbone") or None)

    @cached_property
    def names(self) -> list[str]:
        """Names of the tasks to answer."""
        wanted = self.settings["tasks"]
        single = [name for name, spec in self.loaded.tasks.items() if spec.reads == "text"]
        names = single if wanted == "all" else [wanted] if isinstance(wanted, str) else list(wanted)
        for name in names:
            if name not in single:
                raise ConfigError(unknown_name("task on single texts", name, single))
        return names

    def _annotate(self, docs: Sequence[Doc]) -> None:
        texts = [doc.text for doc in docs]
        on_words = [name for name in self.names if self.loaded.tasks[name].kind == "token_classification"]
        for task in self.names:
            if task in on_words:
                continue
            labels = self.loaded.tasks[task].label_names or []
            for doc, row in zip(docs, self.loaded.probabilities(texts, task).tolist(), strict=True):
                doc.cats.update({f"{task}:{label}": score for label, score in zip(labels, row, strict=True)})
        if not on_words:
            return
        for doc, prediction in zip(docs, self.loaded.predict(texts, on_words), strict=True):
            entities = [
                entity for answer in prediction.tasks.values() if "entities" in answer for entity in answer["entities"]
            ]
            spans = [self._span(doc, entity) for entity in entities]
            doc.set_ents(filter_spans([*doc.ents, *(span for span in spans if span is not None)]))

    def _span(self, doc: Doc, entity: Entity) -> Span | None:
        alignment = self.settings["alignment"]
        return doc.char_span(entity["start"], entity["end"], label=entity["type"], alignment_mode=alignment)


def make_component(
    nlp: Language, name: str, checkpoint: str, tasks: list[str] | str, device: str, alignment: str, backbone: str
) -> SparseFTComponent:
    """Build the component from its config; spaCy calls this."""
    return SparseFTComponent(
        name, checkpoint=checkpoint, tasks=tasks, device=device, alignment=alignment, backbone=backbone
    )


Language.factory(
    "sparse_ft",
    assigns=["doc.cats", "doc.ents"],
    default_config={"checkpoint": "", "tasks": "all", "device": "auto", "alignment": "expand", "backbone": ""},
    func=make_component,
)
