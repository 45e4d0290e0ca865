"""Find the weights and the density of a merge by the scores on validation rows; test rows are never read."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.merged_expert import MergeSettings, merge_experts
from sparse_ft.merging.merged_tasks import MergedTask, install
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import TaskSpec

BUDGET = 20
"""Trials, unless told otherwise."""
ROWS = 500
"""Validation rows of each task, unless told otherwise: a trial takes seconds."""
_SMALLEST = 0.01


@dataclass(frozen=True)
class Search:
    """What a search found; scores are means of the tasks' metrics on validation rows."""

    settings: MergeSettings
    score: float
    start: float
    """Of equal weights and the default density, the first trial."""
    trials: int


def require_optuna() -> Any:
    """Import Optuna, the extra ``search``.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--search needs Optuna. Install it: pip install 'sparse-ft[search]'.") from error
    return optuna


def search_settings(
    checkpoint: Checkpoint,
    experts: Sequence[Expert],
    tasks: Sequence[MergedTask],
    *,
    start: MergeSettings,
    heads: str,
    budget: int,
    rows: int,
) -> Search:
    """Try weights and densities, beginning with those of ``start``, and return the best by the mean score.

    Candidates come from a tree-structured Parzen estimator: Bergstra et al. 2011,
    https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization. The backbone is loaded once; each
    trial replaces the expert and the heads. Weights are searched from 0.01 to 1.

    Args:
        checkpoint: Its experts and tasks are replaced; those of the last trial are left in it.
        experts: To merge.
        tasks: Of the outcome.
        start: Of ``merge_settings``; its seed draws the candidates, too.
        heads: See ``merged_head``.
        budget: Trials, 2 or more, the first included.
        rows: Validation rows of each task, drawn by the seed.

    Raises:
        ConfigError: If Optuna is not installed, the budget is too small, or the method has nothing to search.
        DataError: If a task has no validation rows with answers.
    """
    optuna = require_optuna()
    heeds = MERGE_METHODS[start.method].heeds
    if not {"weights", "density"} & set(heeds):
        raise ConfigError(f"{start.method} has neither weights nor a density to search. Leave out --search.")
    if budget < 2 or rows < 1:
        raise ConfigError(f"--budget is {budget} and --rows {rows}. Expected 2 trials and 1 row at least.")
    data = _validation_rows(checkpoint, tasks, rows=rows, seed=start.seed)
    names = [expert.name for expert in experts]

    def score(settings: MergeSettings) -> float:
        merged = merge_experts(experts, settings, name="candidate")
        weights = dict(zip(names, settings.weights, strict=True))
        install(checkpoint.model, merged.expert, tasks, weights=weights, heads=heads)
        return statistics.fmean(
            score_rows(spec, found, predict_rows(checkpoint.model, spec, found)).metrics[spec.metric]
            for spec, found in data
        )

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=start.seed))
    tried: list[tuple[float, MergeSettings]] = []
    study.enqueue_trial(
        {f"weight {name}": weight for name, weight in zip(names, start.weights, strict=True)}
        | {"density": start.density}
    )
    with tqdm(total=budget, desc="searching", unit="trial") as bar:
        for number in range(budget):
            trial = study.ask()
            settings = _candidate(trial, start, names=names)
            tried.append((score(start if number == 0 else settings), start if number == 0 else settings))
            study.tell(trial, tried[-1][0])
            bar.update()
            bar.set_postfix(best=f"{max(found for found, _ in tried):.4f}", refresh=False)
    best, settings = max(tried, key=lambda entry: entry[0])  # the first of equals
    return Search(settings, best, tried[0][0], budget)


def _candidate(trial: Any, start: MergeSettings, *, names: Sequence[str]) -> MergeSettings:
    """Let a trial fill in what the method heeds, in figures that a user can type again."""
    heeds = MERGE_METHODS[start.method].heeds
    weights, density = start.weights, start.density
    if "weights" in heeds:
        weights = tuple(round(trial.suggest_float(f"weight {name}", _SMALLEST, 1.0), 3) for name in names)
    if "density" in heeds:
        density = round(trial.suggest_float("density", _SMALLEST, 1.0), 3)
    return replace(start, weights=weights, density=density)


def _validation_rows(
    checkpoint: Checkpoint, tasks: Sequence[MergedTask], *, rows: int, seed: int
) -> list[tuple[TaskSpec, EncodedRows]]:
    """Read and encode validation rows of all tasks that go into a merge."""
    encoder = Encoder(checkpoint.model.backbone, max_length=checkpoint.config.data.max_length)
    found = []
    for task in tasks:
        for part in task.parts:
            spec = task.spec_of(part)
            split = read(spec, data=part.source, splits=["validation"]).get("validation")
            if split is not None and len(split) > rows:
                split = split.shuffle(seed=seed).select(range(rows))
            data = None if split is None else encode_rows(split.to_dict(), spec=spec, encoder=encoder)
            if data is None or data.num_rows == 0:
                raise DataError(f"Task {part.name!r} has no validation rows with answers, which --search needs.")
            found.append((spec, data))
    return found
