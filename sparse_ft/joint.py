"""What a joint run is by its config: which experts it has in common, how its gate chooses, what it refuses.

The gate's gradient from the task loss is 0 with one expert, or with ``top_k`` = 1 and weights that sum to 1, so a joint
run mixes two experts or more, or takes the probability of the one as its weight (Switch: Fedus et al. 2021,
https://arxiv.org/abs/2101.03961).
"""

from sparse_ft.config import GateConfig, RunConfig
from sparse_ft.errors import ConfigError
from sparse_ft.experts.choosing import Choice

SHARED = "shared"
"""Name of the expert that every row of a joint run uses, if it has one."""


def pool_names(number: int) -> list[str]:
    """Name the experts of a pool."""
    return [f"pool-{place}" for place in range(number)]


def joint_choice(settings: GateConfig) -> Choice:
    """Return how the gate of a joint run chooses: two experts by default, and Switch's weights for one."""
    top_k = settings.top_k or 2
    return Choice(
        top_k=top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        normalise=top_k > 1,
        min_confidence=settings.min_confidence,
        jitter=settings.jitter,
        capacity=settings.capacity,
    )


def has_gate(run: RunConfig) -> bool:
    """Whether a run trains a gate with its experts; a pool of one is an expert that all tasks share."""
    return run.stage == "joint" and run.experts.pool != 1


def check_joint(run: RunConfig, *, num_experts: int) -> None:
    """Refuse settings that no joint run can have.

    Args:
        run: The run's config.
        num_experts: That the gate will choose among.

    Raises:
        ConfigError: With the setting to change.
    """
    settings = run.gate
    if settings.type == "prototype":
        raise ConfigError("gate.type is prototype, which learns nothing. A joint run takes sequence or token.")
    if num_experts < 2 and has_gate(run):
        raise ConfigError(
            "A joint run mixes at least 2 experts, and here is 1. Name more tasks, start --from a checkpoint with "
            "other experts, or set experts.pool."
        )
    shortlist = settings.shortlist
    if shortlist is not None and shortlist < joint_choice(settings).top_k:
        raise ConfigError(
            f"gate.shortlist is {shortlist}, but each token goes through gate.top_k={joint_choice(settings).top_k} "
            "experts of it. Raise it."
        )
    if shortlist is not None and settings.capacity is not None:
        raise ConfigError("gate.capacity counts over all experts, so it cannot be set with gate.shortlist.")
    if run.experts.shared_a and not run.experts.pool:
        raise ConfigError("experts.shared_a needs a pool: set experts.pool to the number of its experts.")
