"""The ways to answer texts: tasks asked of all, tasks that each text names, or what a gate or rules choose."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.experts.gates import SequenceGate
from sparse_ft.experts.inference import (
    EncodedTexts,
    logits_by_task,
    row_logits,
    stacked_means,
    text_routing,
    with_hidden_states,
    with_trunks,
)
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.ensembles import Ensemble, ensemble_logits
from sparse_ft.prediction.requests import FORMS, Request, Text, columns_of, form_of, parts_of
from sparse_ft.prediction.rules import Rules, joined
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.answers import Answer, Prediction

_Key = tuple[int, ...]


class Answering:
    """Answers for as many texts as fit into memory at once; threads take turns.

    Args:
        checkpoint: What ``load_checkpoint`` gave.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tasks = checkpoint.tasks
        self.encoder = Encoder(checkpoint.model.backbone, max_length=checkpoint.config.data.max_length)
        self.lock = threading.Lock()

    def task_names(self, tasks: Sequence[str] | str) -> list[str]:
        """Return the names of tasks that are asked for, ``"all"`` or some.

        Raises:
            ConfigError: If one is unknown, or there is none.
        """
        if tasks == "all":
            return list(self.tasks)
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        for name in names:
            self.checkpoint.model.head(name)
        if not names:
            raise ConfigError('No task is given. Name some of the checkpoint, or write "all".')
        return names

    def by_row(self, rows: Sequence[Request]) -> list[Prediction]:
        """Answer the tasks that each text names itself; those with an expert of their own run in the same batches."""
        model, texts = self.checkpoint.model, [row.text for row in rows]
        asked = [self.task_names(row.tasks or []) for row in rows]
        alone = [name for name, slot in model.tasks.items() if not slot.gated and slot.shared is None]
        answers: list[dict[str, Answer]] = [{} for _ in rows]
        routings: list[dict[str, float]] = [{} for _ in rows]
        again = any(len(names) > 1 for names in asked) and len({form_of(text) for text in texts}) == 1
        trunk = self._shared(texts) if again and self._keeps_trunk else {}
        places = {name: [place for place, names in enumerate(asked) if name in names] for name in alone}
        jobs = {
            name: self._examples(name, [texts[place] for place in where], shared=trunk)
            for name, where in places.items()
            if where
        }
        with self.lock:
            logits = logits_by_task(model, jobs)
        for name, outputs in logits.items():
            found = self._decoded(name, [texts[place] for place in places[name]], outputs)
            for place, answer in zip(places[name], found, strict=True):
                answers[place][name] = answer
                routings[place][model.tasks[name].experts[0]] = 1.0
        mixed = [tuple(name for name in names if name not in alone) for names in asked]
        for group in dict.fromkeys(filter(None, mixed)):  # by the gate, as if all texts asked for the same
            where = [place for place, names in enumerate(mixed) if names == group]
            for place, prediction in zip(where, self.by_task([texts[p] for p in where], group, {}), strict=True):
                answers[place].update(prediction.tasks)
                routings[place].update(prediction.routing)
        return [
            _prediction(text, {name: found[name] for name in names}, routing)
            for text, names, found, routing in zip(texts, asked, answers, routings, strict=True)
        ]

    def by_rules(self, rows: Sequence[Request], rules: Rules) -> list[Prediction]:
        """Let rules choose an expert for every text, and answer the tasks of that expert."""
        model, texts = self.checkpoint.model, [row.text for row in rows]
        for text in texts:
            form_of(text)  # says what is wrong with it
        shown = [joined(*parts_of(text)[:2]) for text in texts]
        chosen = rules.choose(shown, [row.metadata for row in rows])
        routing = Routing.one_hot(
            [0 if name is None else model.experts.index(name) for name in chosen], device=model.device
        )
        answers = self._routed(texts, chosen, routing, shared={})
        for text, name, found in zip(texts, chosen, answers, strict=True):
            if name is not None and not found:
                raise DataError(
                    f"The rules send {text!r} to expert {name!r}, which serves no task on {FORMS[form_of(text)]}. "
                    "Change the rule, or name the tasks."
                )
        return [
            _prediction(text, found, {} if name is None else {name: 1.0}, unknown=name is None)
            for text, name, found in zip(texts, chosen, answers, strict=True)
        ]

    def _routed(
        self,
        texts: Sequence[Text],
        chosen: Sequence[str | None],
        routing: Routing,
        *,
        shared: Mapping[str, Mapping[_Key, Example]],
    ) -> list[dict[str, Answer]]:
        """Answer for each text the tasks that its expert serves, of those that read such texts.

        Args:
            texts: The rows.
            chosen: The expert of each, whose tasks are answered; None answers none.
            routing: Of the rows.
            shared: What has been computed of the texts, by task; all of it where the gate mixes the experts.
        """
        answers: list[dict[str, Answer]] = [{} for _ in texts]
        for name, slot in self.checkpoint.model.tasks.items():
            reads = self.tasks[name].reads
            places = [
                place
                for place, expert in enumerate(chosen)
                if expert in slot.experts and form_of(texts[place]) == reads
            ]
            own = None if slot.joint and name in shared else routing.take(places)
            found = self._answers(name, [texts[place] for place in places], shared=shared.get(name, {}), routing=own)
            for place, answer in zip(places, found, strict=True):
                answers[place][name] = answer
        return answers

    def by_task(
        self, texts: Sequence[Text], names: Sequence[str], ensembles: Mapping[str, Ensemble]
    ) -> list[Prediction]:
        """Answer these tasks for every text, each by its own experts, and others by ensembles."""
        model = self.checkpoint.model
        for name in (*names, *ensembles):
            columns_of(self.tasks[name], texts)  # says what is wrong with the texts
        alone = [name for name in names if not model.tasks[name].joint]
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
            if slot.joint:
                groups.setdefault((slot.shared, self._sees_shapes(name)), []).append(name)
        return list(groups.values())

    def _sees_shapes(self, task: str) -> bool:
        """Whether the experts that a task mixes see how its words are written."""
        model = self.checkpoint.model
        slot = model.tasks[task]
        return slot.joint and slot.level == "word" and bool(model.word_shapes.blocks_of(None))

    def _mixed(self, texts: Sequence[Text], task: str) -> tuple[dict[_Key, Example], Tensor]:
        """Run texts through the experts that the gate mixes, for all tasks that are mixed like this one.

        Returns:
            Examples with what leaves the backbone, and the mean weight of each expert, [texts, experts].
        """
        model = self.checkpoint.model
        with self.lock:
            examples, usage = with_hidden_states(model, task, self._encoded(task, texts))
        found = {_key(example, shapes=self._sees_shapes(task)): example for example in examples}
        rows = torch.tensor([example.row for example in examples], dtype=torch.long)
        return found, _mean_by_text(usage, rows, len(texts))

    def _domain_weights(self, texts: Sequence[Text], task: str) -> Tensor:
        """Return the weights that the gate gives the several experts of a task, [texts, experts]."""
        model = self.checkpoint.model
        with self.lock:
            examples = self._encoded(task, texts)
            usage = text_routing(model, examples, task=task).dense_weights(len(model.experts.names)).cpu()
        return _mean_by_text(usage, torch.tensor([example.row for example in examples]), len(texts))

    def by_gate(self, texts: Sequence[Text]) -> list[Prediction]:
        """Let the gate choose an expert for every text, and answer the tasks of that expert."""
        model = self.checkpoint.model
        gate = model.text_gate()
        with self.lock, torch.no_grad():
            examples = with_trunks(model, self._plain(texts), block=gate.block, means=True)
            tokens, unfit = [example.input_ids for example in examples], self._unfit(texts, gate)
            if texts and len(unfit) == len(gate.names):
                raise DataError(
                    f"No task of this checkpoint reads {FORMS[form_of(texts[0])]}, as {texts[0]!r} is. Its tasks read "
                    f"{' or '.join(dict.fromkeys(FORMS[spec.reads] for spec in self.tasks.values()))}."
                )
            decided = gate.decide(stacked_means(examples).to(model.device), tokens, excluded=unfit)
        reusable = self._keeps_trunk and gate.block == model.first_block
        trunk = {_key(example): example for example in examples} if reusable else {}
        names = [name for name in model.tasks if self.tasks[name].reads == form_of(texts[0])]
        shared = dict.fromkeys(names, trunk)
        for group in self._mixed_groups(names):
            shared.update(dict.fromkeys(group, self._mixed(texts, group[0])[0]))
        assert decided.logits is not None
        assert decided.experts is not None
        routing = model.reindexed(decided, gate.names)
        probabilities = decided.logits.softmax(-1).tolist()
        best = [
            None if not weights[0] else gate.names[experts[0]]
            for experts, weights in zip(decided.experts.tolist(), decided.weights.tolist(), strict=True)
        ]
        answers = self._routed(texts, best, routing, shared=shared)
        return [
            _prediction(text, answer, dict(zip(gate.names, shares, strict=True)), unknown=expert is None)
            for text, answer, shares, expert in zip(texts, answers, probabilities, best, strict=True)
        ]

    def _unfit(self, texts: Sequence[Text], gate: SequenceGate) -> list[int]:
        """Return the places of the gate's experts that serve no task on what the texts are."""
        model, form = self.checkpoint.model, form_of(texts[0])
        slots = [slot for name, slot in model.tasks.items() if self.tasks[name].reads == form]
        fit = {expert for slot in slots for expert in slot.experts}
        return [place for place, name in enumerate(gate.names) if name not in fit]

    @property
    def _keeps_trunk(self) -> bool:
        """Whether what lies below the experts can be computed once for several tasks."""
        model = self.checkpoint.model
        return model.first_block > 0 and model.backbone.family.caches_trunk

    def _plain(self, texts: Sequence[Text]) -> list[Example]:
        """Encode texts or pairs without regard to a task; choices are not seen."""
        if len({form_of(text) for text in texts}) > 1:
            raise DataError("Some of the texts are pairs and some are not, or have choices. Ask for them apart.")
        pairs = [text[1] or "" for text in texts if not isinstance(text, str)]
        return self.encoder.texts([text if isinstance(text, str) else text[0] for text in texts], pairs or None)

    def _shared(self, texts: Sequence[Text]) -> dict[_Key, Example]:
        """Run the blocks below the experts once for all tasks."""
        with self.lock:
            return {_key(row): row for row in with_trunks(self.checkpoint.model, self._plain(texts))}

    def _answers(
        self,
        task: str,
        texts: Sequence[Text],
        *,
        shared: Mapping[_Key, Example],
        routing: Routing | None = None,
        ensemble: Ensemble | None = None,
    ) -> list[Answer]:
        return self._decoded(
            task, texts, self.row_logits(task, texts, shared=shared, routing=routing, ensemble=ensemble)
        )

    def _decoded(self, task: str, texts: Sequence[Text], rows: Sequence[Tensor]) -> list[Answer]:
        """Turn a task's logits for each text into answers."""
        spec = self.tasks[task]
        kind, labels = find_kind(spec.kind), spec.label_names or []
        own = [text[2] if len(text) == 3 and not isinstance(text, str) else labels for text in texts]
        return [
            kind.answer(logits, text=text if isinstance(text, str) else text[0], labels=names, language=spec.language)
            for text, names, logits in zip(texts, own, rows, strict=True)
        ]

    def _encoded(self, task: str, texts: Sequence[Text]) -> list[Example]:
        spec = self.tasks[task]
        columns = columns_of(spec, texts)
        return find_kind(spec.kind).encode(
            columns, encoder=self.encoder, labels=spec.label_names or [], language=spec.language
        )

    def row_logits(
        self,
        task: str,
        texts: Sequence[Text],
        *,
        shared: Mapping[_Key, Example] | None = None,
        routing: Routing | None = None,
        ensemble: Ensemble | None = None,
    ) -> list[Tensor]:
        """Compute the logits of a task for texts, see ``inference.row_logits``, with what has been computed of them."""
        examples, num_rows, num_parts = self._examples(task, texts, shared=shared or {})
        with self.lock:
            if ensemble is not None:
                return ensemble_logits(
                    self.checkpoint.model, self.tasks, ensemble, examples, num_rows=num_rows, num_parts=num_parts
                )
            own = None if routing is None else routing.take([example.row for example in examples])
            return row_logits(
                self.checkpoint.model, task, examples, num_rows=num_rows, num_parts=num_parts, routing=own
            )

    def _examples(self, task: str, texts: Sequence[Text], *, shared: Mapping[_Key, Example]) -> EncodedTexts:
        """Encode texts for a task, with what has been computed of them."""
        spec = self.tasks[task]
        num_parts = find_kind(spec.kind).num_parts(columns_of(spec, texts), language=spec.language)
        with self.lock:  # a tokenizer keeps its truncation settings in itself
            examples: Sequence[Example] = self._encoded(task, texts)
        if shared:
            shapes = self._sees_shapes(task)
            kept = [shared.get(_key(example, shapes=shapes)) for example in examples]
            examples = [
                replace(example, trunk=twin.trunk, hidden=twin.hidden) if twin is not None else example
                for example, twin in zip(examples, kept, strict=True)
            ]
        return EncodedTexts(examples, len(texts), num_parts)


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
    first, second, choices = parts_of(text)
    return Prediction(first, tasks, routing, second, unknown, choices)
