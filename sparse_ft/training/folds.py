"""Scores over folds: every row is tested once, by a model that was not trained on it."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ft.checkpoint.manifest import read_manifest
from sparse_ft.config import RunConfig
from sparse_ft.errors import ConfigError
from sparse_ft.evaluation.evaluate import Evaluation
from sparse_ft.evaluation.tables import printable, text_table
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.reading import is_undivided
from sparse_ft.tasks.spec import Division, TaskSpec


class FoldScores(NamedTuple):
    """The scores of one task over all folds."""

    rows: int
    """Number of rows, each tested once."""
    folds: list[dict[str, float]]
    """Metrics of each fold."""

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each metric over the folds."""
        return {name: statistics.fmean(fold[name] for fold in self.folds) for name in self.folds[0]}

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation of each metric over the folds."""
        return {name: statistics.stdev(fold[name] for fold in self.folds) for name in self.folds[0]}

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the task in metrics.json."""
        return {
            "split": f"{len(self.folds)} folds",
            "n": self.rows,
            "metrics": self.mean,
            "spread": self.spread,
            "folds": self.folds,
        }

    def to_text(self, task: str) -> str:
        """Return a table of the metrics."""
        header = ["metric", "mean", "spread", *(f"fold {number}" for number in range(1, len(self.folds) + 1))]
        rows = [
            [name, f"{mean:.3f}", f"{self.spread[name]:.3f}", *(f"{fold[name]:.3f}" for fold in self.folds)]
            for name, mean in self.mean.items()
        ]
        title = f"{printable(task)} · {len(self.folds)} folds ({self.rows:,} rows, each tested once)"
        return "\n".join([title, *text_table(header, rows, min_width=5, ruled=True)])


def check_folds(
    run: RunConfig, specs: Sequence[TaskSpec], *, folds: int, sources: Mapping[str, TaskData], resume: bool
) -> None:
    """Refuse folds of a run whose rows cannot be divided into them.

    Raises:
        ConfigError: With every problem in one paragraph.
    """
    problems = []
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        problems.append(f"--folds is {folds!r}. Expected a whole number, at least 2.")
    if resume or run.stage == "gate":
        problems.append("--folds trains anew. Leave out --resume and --stage gate.")
    if run.shared.teachers:
        problems.append("--folds would test rows that the teachers were trained on. Leave out --folds or the teachers.")
    known = [] if run.start is None or resume else list(read_manifest(Path(run.start)).tasks)
    for spec in specs:
        if not is_undivided(sources.get(spec.name)):
            problems.append(
                f"--folds divides the rows of one file, but the data of task {spec.name!r} has splits of its own. Name "
                "a file with --data, or leave --folds out."
            )
        if spec.name in known:
            problems.append(
                f"Task {spec.name!r} of {run.start!r} was trained on rows that a fold would test. Leave out --folds or "
                "--from."
            )
    if problems:
        raise ConfigError(" ".join(problems))


def fold_specs(specs: Sequence[TaskSpec], number: int, *, folds: int) -> list[TaskSpec]:
    """Return tasks whose rows are divided so that fold ``number`` is tested, from 1."""
    division = Division(rule="stratified", fold=(number, folds))
    return [spec.model_copy(update={"division": division}) for spec in specs]


def gather_scores(evaluations: Sequence[Evaluation]) -> dict[str, FoldScores]:
    """Gather the scores of each task from the evaluations of all folds."""
    scores = {}
    for task in evaluations[0].tasks:
        reports = [evaluation.tasks[task].score for evaluation in evaluations]
        scores[task] = FoldScores(sum(score.n for score in reports), [score.metrics for score in reports])
    return scores
