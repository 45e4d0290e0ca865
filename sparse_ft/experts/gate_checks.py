"""Refuse a gate that does not fit its model."""

from collections.abc import Sequence

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import SequenceGate, TokenGate


def check_text_gate(gate: SequenceGate | TokenGate | None, names: Sequence[str], *, joint: bool) -> SequenceGate:
    """Return a gate if it can choose an expert for a text of no known task.

    Args:
        gate: The gate of a model.
        names: The experts that it has to choose among.
        joint: Whether a task was trained together with the gate.

    Raises:
        ConfigError: If there is none, or the experts are not those that it was fitted on.
    """
    fit = "Fit one with `sparse-ft train --stage gate --from CHECKPOINT`, or name the tasks with --task."
    name_tasks = "Name the tasks with --task."
    if gate is None:
        raise ConfigError(f"This model has no gate to choose among its experts. {fit}")
    if gate.every_block:
        raise ConfigError(f"The gate of this model decides for every token, not for whole texts. {name_tasks}")
    unknown = [name for name in names if name not in gate.names]
    if unknown and joint:
        raise ConfigError(
            f"The gate was trained with the experts that it mixes and does not know {unknown[0]!r}. {name_tasks}"
        )
    if unknown:
        raise ConfigError(f"The gate does not know the expert {unknown[0]!r}, which came later. {fit}")
    if set(gate.names) != set(names):
        raise ConfigError(f"The gate chooses among {', '.join(gate.names)}, the model has {', '.join(names)}. {fit}")
    return gate


def check_token_routing(backbone: Backbone) -> None:
    """Refuse a backbone whose architecture cannot route tokens.

    Raises:
        ConfigError: If its attention shares layers between rows.
    """
    if not backbone.family.routes_rows:
        raise ConfigError(
            f"The tokens of backbone {backbone.name!r} cannot be routed one by one: its attention shares layers "
            "between rows. Route whole texts."
        )
