"""From requests to answers: choose tasks and experts, encode, run in batches, decode.

Every text answers the same tasks, or names its own, or is answered by the tasks of the expert that rules or a gate
choose for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.experts.inference import EncodedTexts, logits_by_task, row_logits, with_hidden_states, with_trunks
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.ensembles import Ensemble, ensemble_logits
from sparse_ft.prediction.fork_lock import ForkLock
from sparse_ft.prediction.requests import FORMS, Request, Text, columns_of, form_of, joined, parts_of
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.answers import Answer, Prediction

_Cache = Mapping[tuple[int, ...], Example]
"""Examples that carry a trunk or hidden states, by the token ids that the backbone reads."""


class Answering:
    """Answers as many requests as fit into memory at once; threads take turns.

    Args:
        checkpoint: As ``load_checkpoint`` returns it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.tasks = checkpoint, checkpoint.tasks
        self.encoder = Encoder(checkpoint.model.backbone, max_length=checkpoint.config.data.max_length)
        self.lock = ForkLock()

    @property
    def model(self) -> SparseExpertModel:
        """The model of the checkpoint."""
        return self.checkpoint.model

    def task_names(self, tasks: Sequence[str] | str) -> list[str]:
        """Return the names of the requested tasks, ``"all"`` or some.

        Raises:
            ConfigError: If one is unknown, or there is none.
        """
        if tasks == "all":
            return list(self.tasks)
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        for name in names:
            self.model.head(name)
        if not names:
            raise ConfigError('No task is given. Name some of the checkpoint, or write "all".')
        return names

    def answer(
        self,
        requests: Sequence[Request],
        *,
        names: Sequence[str] = (),
        ensembles: Mapping[str, Ensemble] | None = None,
        route: Route | None = None,
    ) -> list[Prediction]:
        """Answer requests, in order.

        Args:
            requests: Texts, with or without tasks of their own.
            names: Tasks of the requests that name none.
            ensembles: More tasks of these requests, each answered by several experts.
            route: Rules or a gate that choose the tasks of these requests in place of ``names``.
        """
        naming = [request for request in requests if request.tasks is not None]
        others = [request for request in requests if request.tasks is None]
        with self.lock:
            named = iter(self._answer_named(naming) if naming else [])
            if others and route is not None:
                rest = iter(self._answer_routed(others, route))
            else:
                texts = [request.text for request in others]
                rest = iter(self._answer_tasks(texts, names, ensembles or {}) if others else [])
        return [next(rest if request.tasks is None else named) for request in requests]

    def logits(self, task: str, texts: Sequence[Text]) -> list[Tensor]:
        """Compute the logits of a task for each text; see ``inference.row_logits``."""
        with self.lock:
            return self._task_logits(task, texts, cache={})

    def _answer_named(self, requests: Sequence[Request]) -> list[Prediction]:
        """Answer the tasks that each text names itself; tasks that one expert serves run in the same batches."""
        texts = [request.text for request in requests]
        names_of = [self.task_names(request.tasks or []) for request in requests]
        answers: list[dict[str, Answer]] = [{} for _ in texts]
        shares: list[dict[str, float]] = [{} for _ in texts]
        rows_of = {
            name: [row for row, names in enumerate(names_of) if name in names]
            for name, slot in self.model.tasks.items()
            if not slot.gated and slot.shared is None
        }
        for name, answers_of in self._answer_in_common_batches(texts, names_of, rows_of).items():
            for row, answer in zip(rows_of[name], answers_of, strict=True):
                answers[row][name] = answer
                shares[row][self.model.tasks[name].experts[0]] = 1.0
        gated = [tuple(name for name in names if name not in rows_of) for names in names_of]
        for group in dict.fromkeys(filter(None, gated)):
            rows = [row for row, names in enumerate(gated) if names == group]
            for row, prediction in zip(rows, self._answer_tasks([texts[r] for r in rows], group, {}), strict=True):
                answers[row].update(prediction.tasks)
                shares[row].update(prediction.routing)
        requested = [
            {name: answered[name] for name in names} for names, answered in zip(names_of, answers, strict=True)
        ]
        return list(map(_prediction, texts, requested, shares))

    def _answer_in_common_batches(
        self, texts: Sequence[Text], names_of: Sequence[Sequence[str]], rows_of: Mapping[str, Sequence[int]]
    ) -> dict[str, list[Answer]]:
        """Answer tasks that one expert serves, each for its rows, in batches with rows of all these tasks."""
        repeated = any(len(names) > 1 for names in names_of) and len({form_of(text) for text in texts}) == 1
        cache = self._trunks(texts) if repeated else {}
        texts_of = {name: [texts[row] for row in rows] for name, rows in rows_of.items() if rows}
        encoded = {name: self._encode(name, chosen, cache=cache) for name, chosen in texts_of.items()}
        logits = logits_by_task(self.model, encoded)
        return {name: self._decode(name, chosen, logits[name]) for name, chosen in texts_of.items()}

    def _answer_tasks(
        self, texts: Sequence[Text], names: Sequence[str], ensembles: Mapping[str, Ensemble]
    ) -> list[Prediction]:
        """Answer these tasks for every text, each by its own experts, and others by ensembles."""
        for name in (*names, *ensembles):
            columns_of(self.tasks[name], texts)  # refuses texts that the task does not read
        slots = {name: self.model.tasks[name] for name in names}
        separate = [name for name, slot in slots.items() if not slot.joint]
        caches = dict.fromkeys(separate, self._trunks(texts) if len(separate) > 1 else {})
        joint, gated = self._run_joint_experts(texts, names, caches), list[Tensor]()
        answers = {}
        for name, slot in slots.items():
            encoded = self._encode(name, texts, cache=caches[name])
            routing = self._route(name, encoded)
            answers[name] = self._decode(name, texts, self._row_logits(name, encoded, routing))
            if slot.gated and not slot.joint and routing is not None:
                weights = routing.dense_weights(len(self.model.experts.names)).cpu()
                gated.append(_mean_by_text(weights, encoded.examples, len(texts)))
        shares = [{slot.experts[0]: 1.0 for slot in slots.values() if not slot.gated} for _ in texts]
        for weights in (*gated, *joint):
            for share, row in zip(shares, weights.tolist(), strict=True):
                share.update(
                    {name: weight for name, weight in zip(self.model.experts.names, row, strict=True) if weight}
                )
        for name, ensemble in ensembles.items():
            logits = ensemble_logits(self.model, self.tasks, ensemble, self._encode(name, texts, cache={}))
            answers[name] = self._decode(name, texts, logits)
            for share in shares:
                share.update(dict.fromkeys(ensemble.experts, 1 / len(ensemble.experts)))
        rows = [{name: answers_of[row] for name, answers_of in answers.items()} for row in range(len(texts))]
        return list(map(_prediction, texts, rows, shares))

    def _answer_routed(self, requests: Sequence[Request], route: Route) -> list[Prediction]:
        """Let rules or the gate choose an expert for every text, and answer the tasks of that expert."""
        texts = [request.text for request in requests]
        forms = [form_of(text) for text in texts]
        caches: dict[str, _Cache] = {}
        if route.chooser is not None:
            shown = [joined(*parts_of(text)[:2]) for text in texts]
            routing = route.choose(shown, [request.metadata for request in requests])
        else:
            routing = self._ask_gate(texts, route, caches)
        experts = route.answering(routing)
        shares = [dict.fromkeys(chosen, 1.0) for chosen in experts]
        if routing.logits is not None:
            gate = self.model.text_gate()
            rows = gate.partition.probabilities(routing.logits).tolist()
            shares = [dict(zip(gate.names, row, strict=True)) for row in rows]
        answers = self._answer_by_experts(texts, experts, routing, route, caches)
        for text, form, chosen, answered in zip(texts, forms, experts, answers, strict=True):
            if chosen and not answered:
                raise DataError(
                    f"The rules send {text!r} to expert {chosen[0]!r}, which serves no task on {FORMS[form]}. "
                    "Change the rule, or name the tasks."
                )
        unknown = [not chosen for chosen in experts]
        left_out = [
            [name for name, spec in self.tasks.items() if spec.reads == form and name not in answered]
            for form, answered in zip(forms, answers, strict=True)
        ]
        return list(map(_prediction, texts, answers, shares, unknown, left_out))

    def _ask_gate(self, texts: Sequence[Text], route: Route, caches: dict[str, _Cache]) -> Routing:
        """Let the gate choose among the experts that serve tasks on such texts, and fill the caches of these tasks."""
        gate = self.model.text_gate()
        examples = with_trunks(self.model, self._encode_plain(texts), block=gate.block, means=True)
        form = form_of(texts[0])
        names = [name for name in self.model.tasks if self.tasks[name].reads == form]
        fit = {expert for name in names for expert in self.model.tasks[name].experts}
        if fit.isdisjoint(gate.names):
            raise DataError(
                f"No task of this checkpoint reads {FORMS[form]}, as {texts[0]!r} is. Its tasks read "
                f"{' or '.join(dict.fromkeys(FORMS[spec.reads] for spec in self.tasks.values()))}."
            )
        if self._reuses_trunk and gate.block == self.model.first_block:
            cache = {_key(example): example for example in examples}
            caches.update(dict.fromkeys(names, cache))
        routing = route.rows(examples, among=fit)
        self._run_joint_experts(texts, names, caches)
        return routing

    def _answer_by_experts(
        self,
        texts: Sequence[Text],
        experts: Sequence[Sequence[str]],
        routing: Routing,
        route: Route,
        caches: Mapping[str, _Cache],
    ) -> list[dict[str, Answer]]:
        """Answer for each text the tasks that its experts serve, of those that read such texts."""
        answers: list[dict[str, Answer]] = [{} for _ in texts]
        for name, slot in self.model.tasks.items():
            reads = self.tasks[name].reads
            rows = [
                row
                for row, chosen in enumerate(experts)
                if not set(chosen).isdisjoint(slot.experts) and form_of(texts[row]) == reads
            ]
            if not rows:
                continue
            chosen = [texts[row] for row in rows]
            own = None if slot.joint and name in caches else route.serving(routing, name).take(rows)
            logits = self._task_logits(name, chosen, cache=caches.get(name, {}), routing=own)
            for row, answer in zip(rows, self._decode(name, chosen, logits), strict=True):
                answers[row][name] = answer
        return answers

    def _run_joint_experts(
        self, texts: Sequence[Text], names: Sequence[str], caches: dict[str, _Cache]
    ) -> list[Tensor]:
        """Run texts once through the experts that the gate mixes, for all joint tasks that the experts see alike.

        Returns:
            The mean weight of each expert, [texts, experts], of each group of such tasks.
        """
        groups: dict[Any, list[str]] = {}
        for name in names:
            slot = self.model.tasks[name]
            if slot.joint:
                groups.setdefault((slot.shared, self._reads_word_shapes(name)), []).append(name)
        weights = []
        for group in groups.values():
            encoded = self._encode(group[0], texts, cache={})
            routing = self._route(group[0], encoded)
            examples, usage = with_hidden_states(self.model, group[0], encoded.examples, routing=routing)
            cache = {_key(example, shapes=self._reads_word_shapes(group[0])): example for example in examples}
            caches.update(dict.fromkeys(group, cache))
            weights.append(_mean_by_text(usage, examples, len(texts)))
        return weights

    def _reads_word_shapes(self, task: str) -> bool:
        """Whether the experts of a joint task see how its words are written."""
        slot = self.model.tasks[task]
        return slot.joint and slot.level == "word" and bool(self.model.word_shapes.blocks_of(None))

    @property
    def _reuses_trunk(self) -> bool:
        """Whether the blocks below the experts can run once for several tasks."""
        return self.model.first_block > 0 and self.model.backbone.family.caches_trunk

    def _trunks(self, texts: Sequence[Text]) -> _Cache:
        """Run the blocks below the experts once for all tasks; empty if the backbone cannot continue from there."""
        if not self._reuses_trunk:
            return {}
        return {_key(example): example for example in with_trunks(self.model, self._encode_plain(texts))}

    def _encode_plain(self, texts: Sequence[Text]) -> list[Example]:
        """Encode texts or pairs without regard to a task; choices are not seen."""
        if len({form_of(text) for text in texts}) > 1:
            raise DataError("Some of the texts are pairs and some are not, or have choices. Ask for them apart.")
        pairs = [text[1] or "" for text in texts if not isinstance(text, str)]
        return self.encoder.texts([text if isinstance(text, str) else text[0] for text in texts], pairs or None)

    def _encode(self, task: str, texts: Sequence[Text], *, cache: _Cache) -> EncodedTexts:
        """Encode texts for a task, with the trunks or hidden states that a cache holds of them."""
        spec = self.tasks[task]
        kind, columns = find_kind(spec.kind), columns_of(spec, texts)
        examples = kind.encode(columns, encoder=self.encoder, labels=spec.label_names or [], language=spec.language)
        if cache:
            shapes = self._reads_word_shapes(task)
            twins = [cache.get(_key(example, shapes=shapes), example) for example in examples]
            examples = [
                replace(example, trunk=twin.trunk, hidden=twin.hidden)
                for example, twin in zip(examples, twins, strict=True)
            ]
        return EncodedTexts(examples, len(texts), kind.num_parts(columns, language=spec.language))

    def _task_logits(
        self, task: str, texts: Sequence[Text], *, cache: _Cache, routing: Routing | None = None
    ) -> list[Tensor]:
        """Compute the logits of a task for each text; ``routing`` is that of the texts, None takes the task's."""
        encoded = self._encode(task, texts, cache=cache)
        if routing is None:
            return self._row_logits(task, encoded, self._route(task, encoded))
        return self._row_logits(task, encoded, routing.take([example.row for example in encoded.examples]))

    def _route(self, task: str, encoded: EncodedTexts) -> Routing | None:
        """Route rows by their task; None if the model asks a gate at every block, or the hidden states are cached."""
        cached = all(example.hidden is not None for example in encoded.examples)
        by_task = Route("task", self.model)
        if cached or by_task.block_gate(task) is not None:
            return None
        return by_task.rows(encoded.examples, task=task)

    def _row_logits(self, task: str, encoded: EncodedTexts, routing: Routing | None) -> list[Tensor]:
        examples, num_rows, num_parts = encoded
        return row_logits(self.model, task, examples, num_rows=num_rows, num_parts=num_parts, routing=routing)

    def _decode(self, task: str, texts: Sequence[Text], logits: Sequence[Tensor]) -> list[Answer]:
        """Turn the logits of a task for each text into answers."""
        spec = self.tasks[task]
        kind, labels = find_kind(spec.kind), spec.label_names or []
        return [
            kind.answer(row, text=first, labels=labels if choices is None else choices, language=spec.language)
            for (first, _, choices), row in zip(map(parts_of, texts), logits, strict=True)
        ]


def _key(example: Example, *, shapes: bool = False) -> tuple[int, ...]:
    """Return what the backbone reads of an example and, with ``shapes``, what experts read of its words besides."""
    return (*example.input_ids, -1, *(example.token_type_ids or ()), -2, *(example.word_shapes if shapes else ()))


def _mean_by_text(weights: Tensor, examples: Sequence[Example], num_texts: int) -> Tensor:
    """Average [examples, experts] over the examples of each text, [texts, experts]; 0 for a text without any."""
    rows = torch.tensor([example.row for example in examples], dtype=torch.long)
    sums = torch.zeros(num_texts, weights.shape[1]).index_add(0, rows, weights)
    return sums / rows.bincount(minlength=num_texts).clamp_min(1).unsqueeze(1)


def _prediction(
    text: Text,
    tasks: dict[str, Answer],
    routing: dict[str, float],
    unknown: bool = False,
    left_out: Sequence[str] = (),
) -> Prediction:
    first, second, choices = parts_of(text)
    return Prediction(first, tasks, routing, second, unknown, choices, left_out)
