"""The processes of a training run that a launcher started (``accelerate launch``, ``torchrun``), one as a rule.

Each holds the whole model, computes its share of every batch, and takes the same optimizer step as the others, because
the gradients are summed over all of them. The first one alone writes files, fits the gate and scores the checkpoint.
"""

import datetime
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from sparse_ft.errors import SparseFTError

_Value = TypeVar("_Value")
_PATIENCE = datetime.timedelta(hours=12)
"""How long the others wait for the first process; if it dies, the launcher ends them."""


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _state() -> PartialState | None:
    return _join() if launched() else None


@functools.cache
def _join() -> PartialState:
    if torch.cuda.is_available():  # gloo besides, for runs with --device cpu
        state = PartialState(timeout=_PATIENCE, backend="cuda:nccl,cpu:gloo")
    else:
        state = PartialState(cpu=True, timeout=_PATIENCE)
    if not state.is_main_process:  # what there is to say is said once
        logging.getLogger("sparse_ft").setLevel(logging.ERROR)
    return state


def number() -> int:
    """Return how many processes there are."""
    state = _state()
    return 1 if state is None else state.num_processes


def place() -> int:
    """Return which of them this one is, from 0."""
    state = _state()
    return 0 if state is None else state.process_index


def own_device(device: torch.device) -> torch.device:
    """Give each process of a machine a GPU of its own, if GPUs compute and none is named."""
    state = _state()
    if state is None or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", state.local_process_index)


def from_first(compute: Callable[[], _Value]) -> _Value:
    """Let the first process compute something for all; a user's mistake that it finds is raised in each.

    Args:
        compute: Called in the first process only. Its value must be one that can be pickled.
    """
    if not launched():
        return compute()
    found: list[Any] = [None]
    if place() == 0:
        try:
            found = [compute()]
        except SparseFTError as error:
            found = [error]
    (value,) = broadcast_object_list(found)
    if isinstance(value, SparseFTError):
        raise value
    return value


def same_in_all(module: nn.Module) -> None:
    """Give a module in every process the tensors that it has in the first."""
    if launched():
        state = from_first(lambda: {name: tensor.cpu() for name, tensor in module.state_dict().items()})
        module.load_state_dict(state)


def shared_out(rows: int, compute: Callable[[Sequence[int]], Sequence[_Value]]) -> list[_Value]:
    """Compute something for each row, every process for its share of them, and return it for all.

    Args:
        rows: How many there are.
        compute: Takes numbers of rows and returns as many values, which can be pickled.
    """
    own = range(place(), rows, number())
    found = list(zip(own, compute(own), strict=True))
    if launched():
        found = sorted(gather_object(found), key=lambda pair: pair[0])
    return [value for _, value in found]


def from_each(value: _Value) -> list[_Value]:
    """Return what each process has, in their order; a value must be one that can be pickled."""
    return gather_object([value]) if launched() else [value]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the processes; one that no process has stays None."""
    if not launched():
        return
    device = parameters[0].device
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
    torch.distributed.all_reduce(present)
    touched = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
    flat = torch.cat([_gradient(parameter).flatten() for parameter in touched])
    torch.distributed.all_reduce(flat)
    for parameter, summed in zip(touched, flat.split([parameter.numel() for parameter in touched]), strict=True):
        parameter.grad = summed.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
