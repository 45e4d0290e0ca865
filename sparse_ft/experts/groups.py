"""Groups of experts whose tasks are asked of the same texts: a gate for texts chooses among groups.

Shapes: N rows, E experts of the gate, G groups.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Groups:
    """Divides the experts of a gate into groups, which are answered together.

    Args:
        names: The experts, in the order of the gate's logits.
        groups: Names of the experts of each group; every other expert is a group alone.

    Raises:
        ValueError: If a group is empty or names an unknown expert, or an expert is named twice.
    """

    def __init__(self, names: Sequence[str], groups: Sequence[Sequence[str]] = ()) -> None:
        named = [tuple(sorted(names.index(name) for name in group)) for group in groups]
        listed = [index for members in named for index in members]
        if len(set(listed)) < len(listed) or not all(named):
            raise ValueError(f"the groups {groups!r} name an expert twice, or none")
        self.members = sorted([*named, *((index,) for index in range(len(names)) if index not in listed)])
        """Ascending indices of the experts of each group, in the order of the first expert."""
        self.group_of = [
            next(group for group, members in enumerate(self.members) if index in members) for index in range(len(names))
        ]
        """Index of the group of each expert."""

    def __len__(self) -> int:
        """Return G."""
        return len(self.members)

    def logits(self, logits: Tensor) -> Tensor:
        """Return the log of the mean exponential logit of each group's experts, [..., E] to [..., G].

        A group weighs as much as one expert, however many it has.
        """
        if len(self) == logits.shape[-1]:
            return logits
        parts = [logits[..., list(members)].logsumexp(-1) - math.log(len(members)) for members in self.members]
        return torch.stack(parts, -1)

    def best(self, logits: Tensor) -> list[tuple[int, ...]]:
        """Return the experts of each row's most probable group, from logits [N, E] or [N, G]."""
        return [self.members[group] for group in self.logits(logits).argmax(-1).tolist()]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each expert, from logits [N, E], or of its group, from [N, G], as [N, E]."""
        shares = logits.softmax(-1)
        return shares if shares.shape[-1] == len(self.group_of) else shares[..., self.group_of]
