"""From requests to answers: choose tasks and experts, encode, run in batches, decode.

Every text answers the same tasks, or names its own, or is answered by the tasks of the expert that rules or a gate
choose for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import Example
from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.experts.inference import EncodedTexts, logits_by_task, with_trunks
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.ensembles import Ensemble, ensemble_logits
from sparse_ft.prediction.fork_lock import ForkLock
from sparse_ft.prediction.requests import FORMS, Request, Text, columns_of, form_of, joined, parts_of
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.answers import Answer, Prediction

_Seen = dict[tuple[int, ...], Example]
"""Examples with the states that a gate has read of them, by the token ids that the backbone reads."""


class Answering:
    """Answers as many requests as fit into memory at once; threads take turns.

    Args:
        checkpoint: As ``load_checkpoint`` returns it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.tasks = checkpoint, checkpoint.tasks
        self.encoder = checkpoint.encoder
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
        routed = [request for request in requests if request.tasks is None and route is not None]
        others = [request for request in requests if request.tasks is not None or route is None]
        with self.lock:
            by_route = iter(self._answer_routed(routed, route) if routed and route is not None else [])
            texts = [request.text for request in others]
            names_of = [names if request.tasks is None else self.task_names(request.tasks) for request in others]
            by_name = iter(self._answer_tasks(texts, names_of, ensembles or {}))
        return [next(by_route if request.tasks is None and route is not None else by_name) for request in requests]

    def logits(self, task: str, texts: Sequence[Text]) -> list[Tensor]:
        """Compute the logits of a task for each text; see ``inference.row_logits``."""
        with self.lock:
            return self._run({task: self._encode(task, texts)})[0][task]

    def _answer_tasks(
        self, texts: Sequence[Text], names_of: Sequence[Sequence[str]], ensembles: Mapping[str, Ensemble]
    ) -> list[Prediction]:
        """Answer for each text its tasks, each by the task's own experts, and other tasks of all texts by ensembles."""
        for name in ensembles:
            columns_of(self.tasks[name], texts)  # refuses texts that the task does not read
        rows_of: dict[str, list[int]] = {}
        for row, names in enumerate(names_of):
            for name in names:
                rows_of.setdefault(name, []).append(row)
        chosen = {name: [texts[row] for row in rows] for name, rows in rows_of.items()}
        logits, weights = self._run({name: self._encode(name, own) for name, own in chosen.items()})
        answers: list[dict[str, Answer]] = [{} for _ in texts]
        used: list[dict[str, list[float]]] = [{} for _ in texts]
        for name, rows in rows_of.items():
            answers_of = self._decode(name, chosen[name], logits[name])
            for row, answer, weights_of in zip(rows, answers_of, weights[name].tolist(), strict=True):
                answers[row][name], used[row][name] = answer, weights_of
        for name, ensemble in ensembles.items():
            mixed = ensemble_logits(self.model, self.tasks, ensemble, self._encode(name, texts))
            for answered, answer in zip(answers, self._decode(name, texts, mixed), strict=True):
                answered[name] = answer
        predictions = []
        for text, names, answered, weights_of_task in zip(texts, names_of, answers, used, strict=True):
            shares: dict[str, float] = {}
            for name in sorted(names, key=lambda name: self.model.tasks[name].gated):
                named = zip(self.model.experts.names, weights_of_task[name], strict=True)
                shares.update({expert: weight for expert, weight in named if weight})
            for ensemble in ensembles.values():
                shares.update(dict.fromkeys(ensemble.experts, 1 / len(ensemble.experts)))
            ordered = {name: answered[name] for name in (*names, *ensembles)}
            predictions.append(_prediction(text, ordered, shares))
        return predictions

    def _answer_routed(self, requests: Sequence[Request], route: Route) -> list[Prediction]:
        """Let rules or the gate choose an expert for every text, and answer the tasks of that expert."""
        texts = [request.text for request in requests]
        forms = [form_of(text) for text in texts]
        seen: _Seen = {}
        if route.chooser is not None:
            shown = [joined(*parts_of(text)[:2]) for text in texts]
            routing = route.choose(shown, [request.metadata for request in requests])
        else:
            routing, seen = self._ask_gate(texts, route)
        experts = route.answering(routing)
        shares = [dict.fromkeys(chosen, 1.0) for chosen in experts]
        if routing.logits is not None:
            gate = self.model.text_gate()
            rows = gate.partition.probabilities(routing.logits).tolist()
            shares = [dict(zip(gate.names, row, strict=True)) for row in rows]
        answers = self._answer_by_experts(texts, experts, routing, route, seen)
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

    def _ask_gate(self, texts: Sequence[Text], route: Route) -> tuple[Routing, _Seen]:
        """Let the gate choose among the experts that serve tasks on such texts, and return the states that it read."""
        gate = self.model.text_gate()
        plain = self._encode_plain(texts)
        examples = with_trunks(self.model, plain, block=gate.block, expert=gate.trunk_expert, means=True)
        form = form_of(texts[0])
        fit = {
            expert
            for name, slot in self.model.tasks.items()
            if self.tasks[name].reads == form
            for expert in slot.experts
        }
        if fit.isdisjoint(gate.names):
            raise DataError(
                f"No task of this checkpoint reads {FORMS[form]}, as {texts[0]!r} is. Its tasks read "
                f"{' or '.join(dict.fromkeys(FORMS[spec.reads] for spec in self.tasks.values()))}."
            )
        routing = route.rows(examples, among=fit)
        model = self.model
        if not (
            (gate.block, gate.trunk_expert) == (model.parting_block, model.trunk_expert)
            and model.backbone.family.caches_trunk
        ):
            examples = [replace(example, trunk=None) for example in examples]
        return routing, {_key(example): example for example in examples}

    def _answer_by_experts(
        self,
        texts: Sequence[Text],
        experts: Sequence[Sequence[str]],
        routing: Routing,
        route: Route,
        seen: _Seen,
    ) -> list[dict[str, Answer]]:
        """Answer for each text the tasks that its experts serve, of those that read such texts."""
        forms = [form_of(text) for text in texts]
        encoded, routings, rows_of = {}, {}, {}
        for name, slot in self.model.tasks.items():
            reads = self.tasks[name].reads
            rows = [
                row
                for row, chosen in enumerate(experts)
                if not set(chosen).isdisjoint(slot.experts) and forms[row] == reads
            ]
            if not rows:
                continue
            rows_of[name] = rows
            encoded[name] = self._encode(name, [texts[row] for row in rows], seen=seen)
            if not slot.joint or route.chooser is not None:  # the gate mixes all experts of a joint task
                own = route.serving(routing, name)
                routings[name] = own.take([rows[example.row] for example in encoded[name].examples])
        logits, _ = self._run(encoded, routings)
        answers: list[dict[str, Answer]] = [{} for _ in texts]
        for name, rows in rows_of.items():
            for row, answer in zip(rows, self._decode(name, [texts[row] for row in rows], logits[name]), strict=True):
                answers[row][name] = answer
        return answers

    def _run(
        self, encoded: Mapping[str, EncodedTexts], routings: Mapping[str, Routing] | None = None
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Run the texts of several tasks; all that they have in common runs once, see plan.py.

        Args:
            encoded: Task to its texts.
            routings: Task to the routing of its examples; of the others, the task or the gate that it was trained with
                decides.

        Returns:
            Task to the logits of each text, and to the mean weight of each expert, [texts, experts].
        """
        route, model = Route("task", self.model), self.model
        decided = dict(routings or {})
        by_gate = [name for name in encoded if name not in decided and model.tasks[name].gated]
        encoded = dict(encoded) | self._with_means({name: encoded[name] for name in by_gate})
        groups: dict[Any, list[str]] = {}
        for name, texts in encoded.items():
            gate = None if name in decided else route.block_gate(name)
            if gate is None and name not in decided:
                decided[name] = route.rows(texts.examples, task=name)
            groups.setdefault((gate, model.tasks[name].shared), []).append(name)
        logits: dict[str, list[Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for (gate, _), names in groups.items():
            chosen = {name: encoded[name] for name in names}
            sizes = [len(texts.examples) for texts in chosen.values()]
            usage = torch.zeros(sum(sizes), len(model.gated_blocks(gate)) if gate else 1, len(model.experts.names))
            if gate is None:
                routing = Routing.stacked([decided[name] for name in names], num_experts=usage.shape[-1])
                usage[:, 0] = routing.dense_weights(usage.shape[-1]).cpu()
                logits |= logits_by_task(model, chosen, routing=routing)
            else:
                logits |= logits_by_task(model, chosen, gate=gate, usage=usage)
            for (name, texts), used in zip(chosen.items(), usage.mean(1).split(sizes), strict=True):
                weights[name] = _mean_by_text(used, texts.examples, texts.num_rows)
        return logits, weights

    def _with_means(self, encoded: Mapping[str, EncodedTexts]) -> dict[str, EncodedTexts]:
        """Add to texts what a gate reads of them, computed once for all tasks that read the same."""
        gate = self.model.sequence_gate
        if gate is None:
            return dict(encoded)
        distinct = {_key(example): example for texts in encoded.values() for example in texts.examples}
        lacking = [example for example in distinct.values() if example.means is None]
        read = with_trunks(self.model, lacking, block=gate.block, expert=gate.trunk_expert, hidden=False, means=True)
        means = {_key(example): example.means for example in read}
        return {
            name: texts._replace(
                examples=[replace(each, means=means.get(_key(each), each.means)) for each in texts.examples]
            )
            for name, texts in encoded.items()
        }

    def _encode_plain(self, texts: Sequence[Text]) -> list[Example]:
        """Encode texts or pairs without regard to a task; choices are not seen."""
        if len({form_of(text) for text in texts}) > 1:
            raise DataError("Some of the texts are pairs and some are not, or have choices. Ask for them apart.")
        pairs = [text[1] or "" for text in texts if not isinstance(text, str)]
        languages = {spec.language for spec in self.tasks.values()}
        return self.encoder.texts(
            [text if isinstance(text, str) else text[0] for text in texts],
            pairs or None,
            language=languages.pop() if len(languages) == 1 else "en",
        )

    def _encode(self, task: str, texts: Sequence[Text], *, seen: _Seen | None = None) -> EncodedTexts:
        """Encode texts for a task, with what a gate has seen of them."""
        spec = self.tasks[task]
        kind, columns = find_kind(spec.kind), columns_of(spec, texts)
        examples = kind.encode(columns, encoder=self.encoder, labels=spec.label_names or [], language=spec.language)
        if seen:
            twins = [seen.get(_key(example), example) for example in examples]
            on_trunk = self.model.on_trunk(task)
            examples = [
                replace(example, trunk=twin.trunk if on_trunk else None, means=twin.means)
                for example, twin in zip(examples, twins, strict=True)
            ]
        return EncodedTexts(examples, len(texts), kind.num_parts(columns, language=spec.language))

    def _decode(self, task: str, texts: Sequence[Text], logits: Sequence[Tensor]) -> list[Answer]:
        """Turn the logits of a task for each text into answers."""
        spec = self.tasks[task]
        kind, labels = find_kind(spec.kind), spec.label_names or []
        return [
            kind.answer(row, text=first, labels=labels if choices is None else choices, language=spec.language)
            for (first, _, choices), row in zip(map(parts_of, texts), logits, strict=True)
        ]


def _key(example: Example) -> tuple[int, ...]:
    """Return what the backbone reads of an example."""
    return (*example.input_ids, -1, *(example.token_type_ids or ()), -1, *example.word_shapes)


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
