"""The settings of a merge, checked before anything is read."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import Field, Strict, ValidationError

from sparse_ft.checkpoint.manifest import check_name
from sparse_ft.errors import CheckpointError, ConfigError, explain, unknown_name
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.sections import Section
from sparse_ft.tasks.spec import Split

STACK = "stack"
AVERAGE, SEPARATE = "average", "separate"

_OF_ONE_EXPERT = ("name", "heads")
"""Settings that every method heeds which makes one expert of several."""
_NEEDS = {"budget": "search", "rows": "search", "split": "evaluate"}
"""Setting to the one without which it has no meaning."""


class MergeSettings(Section):
    """How experts are merged and scored; ``merge_settings`` builds it from a user's values."""

    method: str
    """``stack``, which keeps all experts, or a name in ``MERGE_METHODS``, which makes one expert of them."""
    weights: Annotated[tuple[float, ...], Strict(False)] = ()
    """One for each expert, in their order. Empty: all equal, with sum 1. Methods that add up accept negative ones."""
    density: float = Field(0.5, gt=0, le=1)
    """Share of the entries of a delta that sparse methods keep, above 0 to 1."""
    rank: int | None = Field(None, ge=1)
    """Largest rank of the merged expert. None, without ``energy``: in each layer the sum of the experts' ranks, at
    which a weighted sum is exact and the merged expert is no larger than the experts together."""
    energy: float | None = Field(None, gt=0, le=1)
    """In place of a rank: share of each delta's squared Frobenius norm to keep, above 0 to 1."""
    name: str = "merged"
    """Name of the merged expert."""
    heads: str = AVERAGE
    """Head of several tasks with the same labels: ``average``, the name of the expert whose head is taken, or
    ``separate``, which keeps the tasks apart."""
    seed: int = Field(13, ge=0, lt=2**32)
    """Seed of the entries that are dropped at random, and of the search."""
    evaluate: bool = False
    """Whether to score all tasks before and after; after ``stack``, the gate routes if there is one."""
    split: Split = "test"
    """Split that is scored."""
    search: bool = False
    """Whether to find weights and density by the scores on validation rows; needs the extra ``search``."""
    budget: int = Field(20, ge=2)
    """Trials of the search; the first has equal weights and the default density."""
    rows: int = Field(500, ge=1)
    """Validation rows of each task that a trial is scored on, at most."""

    def for_experts(self, number: int) -> "MergeSettings":
        """Return the settings with one weight for each of ``number`` experts.

        Raises:
            ConfigError: If the weights are more or fewer, or the method cannot merge so many experts.
        """
        most = MERGE_METHODS[self.method].most
        if most is not None and number > most:
            raise ConfigError(f"{self.method} merges {most} experts, and there are {number}. Name two of them.")
        if not self.weights:
            return self.model_copy(update={"weights": (1 / number,) * number})
        if len(self.weights) != number:
            raise ConfigError(
                f"--weights {_shown(self.weights)} has {len(self.weights)} numbers for {number} experts. Give one "
                "for each, in their order."
            )
        return self


def merge_settings(values: Mapping[str, Any]) -> MergeSettings:
    """Check the settings of a merge.

    Args:
        values: Settings by name; None leaves the default.

    Raises:
        ConfigError: With all problems: values out of range, unknown names, and settings that the method does not heed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    method = given["method"]
    if method != STACK and method not in MERGE_METHODS:
        raise ConfigError(unknown_name("merge method", method, (STACK, *MERGE_METHODS)))
    problems = [*_unheeded(given), *_contradictions(given)]
    try:
        settings = MergeSettings.model_validate(given)
        problems.extend(_wrong_weights(settings))
    except ValidationError as error:
        problems.append(explain(error, MergeSettings))
    if problems:
        raise ConfigError(" ".join(problems))
    return settings


def _unheeded(given: Mapping[str, Any]) -> Iterator[str]:
    """Name the given settings that make no difference, and what would heed them."""
    method = given["method"]
    heeded = {*MERGE_METHODS[method].heeds, *_OF_ONE_EXPERT} if method != STACK else set()
    heeded |= {"seed"} if given.get("search") else set()
    for name in given:
        able = [other for other, row in MERGE_METHODS.items() if name in row.heeds]
        if name not in heeded and (able or name in _OF_ONE_EXPERT):
            yield f"{method} has no use for --{name}. Leave it out{', or choose ' if able else ''}{', '.join(able)}."
        needed = _NEEDS.get(name)
        if needed is not None and not given.get(needed):
            yield f"--{name} {given[name]} means something with --{needed} only. Add --{needed}, or leave it out."


def _contradictions(given: Mapping[str, Any]) -> Iterator[str]:
    """Name the given settings that exclude or need each other."""
    method = given["method"]
    if "rank" in given and "energy" in given:
        yield "--rank and --energy are both given. Choose one."
    if method == "svd" and not {"rank", "energy"} & given.keys():
        yield "svd cuts to a rank or to a share of the squared norm: give --rank N or --energy 0.99."
    if given.get("search"):
        if find_spec("optuna") is None:
            yield "--search needs Optuna. Install it: pip install 'sparse-ft[search]'."
        searched = {"weights", "density"}
        if method == STACK or not searched & {*MERGE_METHODS[method].heeds}:
            yield f"{method} has neither weights nor a density to search. Leave out --search."
        for name in sorted(searched & given.keys()):
            yield f"--search finds weights and density, and --{name} is given. Leave one of the two out."
    try:
        check_name(given.get("name", "merged"))
    except CheckpointError as error:
        yield str(error)


def _wrong_weights(settings: MergeSettings) -> Iterator[str]:
    """Name what is wrong with the weights, whatever the number of experts."""
    method, weights = settings.method, settings.weights
    if weights and not any(weights):
        yield f"--weights {_shown(weights)}: expected numbers that are not all zero."
    if method != STACK and MERGE_METHODS[method].averages and min(weights, default=0) < 0:
        able = [name for name, row in MERGE_METHODS.items() if "weights" in row.heeds and not row.averages]
        yield (
            f"--weights {_shown(weights)}: {method} averages, so no weight may be negative. These methods add up: "
            f"{', '.join(able)}."
        )


def _shown(weights: tuple[float, ...]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)
