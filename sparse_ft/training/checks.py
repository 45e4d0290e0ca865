"""Refuse runs that cannot be carried out as they are asked for."""

from collections.abc import Sequence

from sparse_ft.config import RunConfig
from sparse_ft.errors import ConfigError
from sparse_ft.experts.model import SparseExpertModel, check_token_routing
from sparse_ft.experts.selection import Selection
from sparse_ft.training.joint import has_gate


def check_kept_experts(model: SparseExpertModel, tasks: Sequence[str], *, run: RunConfig) -> None:
    """Refuse settings of experts that a run which only trains experts of its checkpoint further cannot heed.

    Args:
        model: As the checkpoint has it.
        tasks: Of the run.
        run: Its config, in which only what was asked for counts as set.

    Raises:
        ConfigError: If an expert is otherwise than asked.
    """
    if run.experts.pool or any(task not in model.tasks for task in tasks):
        return  # they are for the new ones
    for name in dict.fromkeys(name for task in tasks for name in model.tasks[task].used):
        expert = model.experts.get(name)
        blocks = [model.backbone.block_of(module) for module in expert.deltas]
        has: dict[str, list[float]] = {
            "rank": sorted(set(expert.ranks.values())),
            "alpha": [expert.alpha],
            "first_block": [min(blocks, default=0)],
        }
        for key, own in has.items():
            asked = getattr(run.experts, key)
            if key in run.experts.model_fields_set and own != [asked]:
                raise ConfigError(
                    f"experts.{key} is {asked}, but the expert {name!r} of {run.start!r}, which is trained further, "
                    f"has {' and '.join(str(value) for value in own)}. Leave the setting out, or train a new expert."
                )


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
    shortlist, top_k = settings.shortlist, Selection.from_settings(settings, joint=True).top_k
    if shortlist is not None and shortlist < top_k:
        raise ConfigError(
            f"gate.shortlist is {shortlist}, but each token goes through gate.top_k={top_k} experts of it. Raise it."
        )
    if shortlist is not None and settings.capacity is not None:
        raise ConfigError("gate.capacity counts over all experts, so it cannot be set with gate.shortlist.")
    if run.experts.shared_a and not run.experts.pool:
        raise ConfigError("experts.shared_a needs a pool: set experts.pool to the number of its experts.")


def check_gate(run: RunConfig, model: SparseExpertModel, *, num_experts: int) -> None:
    """Refuse before training what would fail after it.

    Args:
        run: The run's config.
        model: With its backbone.
        num_experts: That the gate will choose among.

    Raises:
        ConfigError: With the setting to change.
    """
    settings = run.gate
    if settings.block is not None and settings.block >= model.backbone.num_blocks:
        last = model.backbone.num_blocks - 1
        raise ConfigError(f"gate.block is {settings.block}, but the blocks are 0 to {last}. Choose one of them.")
    if settings.top_k is not None and settings.top_k > num_experts:
        raise ConfigError(f"gate.top_k is {settings.top_k}, but there are {num_experts} experts. Lower it.")
    if settings.type == "token" and run.stage != "joint":
        raise ConfigError("gate.type is token, which is trained together with the experts: use --stage joint.")
    if settings.type == "token":
        check_token_routing(model)
    elif settings.shortlist is not None:
        raise ConfigError(f"gate.shortlist is for tokens, but gate.type is {settings.type}. Leave it out.")
    if settings.type == "token" and settings.min_confidence:
        raise ConfigError("gate.min_confidence turns away whole texts, but gate.type is token. Leave it out.")
    if run.stage != "joint" and (run.experts.shared or run.experts.shared_a):
        setting = "shared" if run.experts.shared else "shared_a"
        raise ConfigError(f"experts.{setting} is for experts that are trained jointly. Add --stage joint.")
