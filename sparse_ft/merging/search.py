"""Search for the weights and the density of a merge by the scores on validation rows; test rows are never read."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ft.checkpoint.checkpoint import Checkpoint
from sparse_ft.errors import DataError
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.merged_expert import merge_experts
from sparse_ft.merging.merged_tasks import MergedTask, install
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.merging.settings import MergeSettings
from sparse_ft.progress import progress_bar
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import TaskSpec

_SMALLEST = 0.01
"""Lower bound of the weights and of the density; the upper bound is 1."""


@dataclass(frozen=True)
class Search:
    """The outcome of a search; scores are means of the tasks' metrics on validation rows."""

    settings: MergeSettings
    """Settings of the best trial."""
    score: float
    """Score of the best trial."""
    start: float
    """Score of the first trial: equal weights and the default density."""
    trials: int


def search_settings(
    checkpoint: Checkpoint, experts: Sequence[Expert], tasks: Sequence[MergedTask], start: MergeSettings
) -> Search:
    """Try weights and densities, beginning with those of ``start``, and return the best by the mean score.

    Candidates come from a tree-structured Parzen estimator: Bergstra et al. 2011,
    https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization. The backbone is loaded once; each
    trial replaces the expert and the heads.

    Args:
        checkpoint: Its experts and tasks are replaced; those of the last trial stay in it.
        experts: Experts to merge.
        tasks: Tasks of the merged expert.
        start: Settings with a weight for each expert; the seed also draws the candidates.

    Raises:
        DataError: If a task has no validation rows with answers.
    """
    import optuna  # the extra `search`; merge_settings says if it is missing

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    data = _validation_rows(checkpoint, tasks, start)
    names = [expert.name for expert in experts]
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=start.seed))
    study.enqueue_trial(dict(zip(map(_parameter, names), start.weights, strict=True)) | {"density": start.density})
    trials: list[tuple[float, MergeSettings]] = []
    with progress_bar("searching", total=start.budget, unit="trial", phase=False) as bar:
        for _ in range(start.budget):
            trial = study.ask()
            candidate = _candidate(trial, start, names=names)
            settings = candidate if trials else start  # unrounded in the first trial
            score = _score(checkpoint.model, experts, tasks, settings, data=data)
            study.tell(trial, score)
            trials.append((score, settings))
            bar.update()
            bar.set_postfix(best=f"{max(score for score, _ in trials):.4f}", refresh=False)
    best, settings = max(trials, key=lambda entry: entry[0])  # the first of equals
    return Search(settings, best, trials[0][0], start.budget)


def _score(
    model: SparseExpertModel,
    experts: Sequence[Expert],
    tasks: Sequence[MergedTask],
    settings: MergeSettings,
    *,
    data: Sequence[tuple[TaskSpec, EncodedRows]],
) -> float:
    """Merge the experts by these settings inside the model, and return the mean of the tasks' metrics."""
    weights = {expert.name: weight for expert, weight in zip(experts, settings.weights, strict=True)}
    install(model, merge_experts(experts, settings).expert, tasks, weights=weights, heads=settings.heads)
    return statistics.fmean(
        score_rows(spec, rows, predict_rows(model, spec, rows)).metrics[spec.metric] for spec, rows in data
    )


def _parameter(expert: str) -> str:
    return f"weight {expert}"


def _candidate(trial: Any, start: MergeSettings, *, names: Sequence[str]) -> MergeSettings:
    """Let a trial choose the settings that the method heeds, rounded so that a user can type them again."""
    heeds = MERGE_METHODS[start.method].heeds
    weights, density = start.weights, start.density
    if "weights" in heeds:
        weights = tuple(round(trial.suggest_float(_parameter(name), _SMALLEST, 1.0), 3) for name in names)
    if "density" in heeds:
        density = round(trial.suggest_float("density", _SMALLEST, 1.0), 3)
    return start.model_copy(update={"weights": weights, "density": density})


def _validation_rows(
    checkpoint: Checkpoint, tasks: Sequence[MergedTask], settings: MergeSettings
) -> list[tuple[TaskSpec, EncodedRows]]:
    """Read and encode validation rows of all tasks that go into a merge."""
    encoder = checkpoint.encoder
    encoded = []
    for task in tasks:
        for part in task.parts:
            spec = task.spec_of(part)
            split = read(spec, data=part.source, splits=["validation"]).get("validation")
            if split is not None and len(split) > settings.rows:
                split = split.shuffle(seed=settings.seed).select(range(settings.rows))
            rows = None if split is None else encode_rows(split.to_dict(), spec=spec, encoder=encoder)
            if rows is None or rows.num_rows == 0:
                raise DataError(f"Task {part.name!r} has no validation rows with answers, which --search needs.")
            encoded.append((spec, rows))
    return encoded
