"""The processes of a distributed run (``accelerate launch``, ``torchrun``); one as a rule.

Every rank holds the full model, computes its share of each batch, and takes the same optimizer step as the others,
because gradients are summed over all ranks. Rank 0 alone writes files, fits the gate and scores the checkpoint.
"""

import datetime
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from sparse_ft.errors import SparseFTError

_Value = TypeVar("_Value")
_TIMEOUT = datetime.timedelta(hours=12)
"""How long the other ranks wait for rank 0; if it dies, the launcher ends them."""


def is_distributed() -> bool:
    """Return whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@functools.cache
def _state() -> PartialState:
    """Join the process group; only a distributed run has one."""
    if torch.cuda.is_available():  # gloo besides nccl, for runs with --device cpu
        state = PartialState(timeout=_TIMEOUT, backend="cuda:nccl,cpu:gloo")
    else:
        state = PartialState(cpu=True, timeout=_TIMEOUT)
    if not state.is_main_process:  # messages are shown once
        logging.getLogger("sparse_ft").setLevel(logging.ERROR)
    return state


def world_size() -> int:
    """Return the number of processes."""
    return _state().num_processes if is_distributed() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return _state().process_index if is_distributed() else 0


def rank_device(device: torch.device) -> torch.device:
    """Return the GPU of this process if the run computes on GPUs and names none, else ``device``."""
    if not is_distributed() or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", _state().local_process_index)


def broadcast(compute: Callable[[], _Value]) -> _Value:
    """Compute a value in rank 0 and return it in all ranks.

    Args:
        compute: Called in rank 0 only; its value must be picklable.

    Raises:
        SparseFTError: In every rank, if ``compute`` raises one.
    """
    if not is_distributed():
        return compute()
    message: list[Any] = [None]
    if rank() == 0:
        try:
            message = [compute()]
        except SparseFTError as error:
            message = [error]
    (value,) = broadcast_object_list(message)
    if isinstance(value, SparseFTError):
        raise value
    return value


def broadcast_module(module: nn.Module) -> None:
    """Copy the tensors of a module from rank 0 to all ranks."""
    if is_distributed():
        module.load_state_dict(broadcast(lambda: {name: tensor.cpu() for name, tensor in module.state_dict().items()}))


def gather(value: _Value) -> list[_Value]:
    """Return the value of each rank, in the order of the ranks; values must be picklable."""
    return gather_object([value]) if is_distributed() else [value]


def gather_rows(num_rows: int, compute: Callable[[Sequence[int]], Sequence[_Value]]) -> list[_Value]:
    """Compute a value for each row, every rank for its share of the rows, and return all values in every rank.

    Args:
        num_rows: Number of rows.
        compute: Takes indices of rows and returns a picklable value for each.
    """
    share = range(rank(), num_rows, world_size())
    parts = gather(dict(zip(share, compute(share), strict=True)))
    by_row = {row: value for part in parts for row, value in part.items()}
    return [by_row[row] for row in range(num_rows)]


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all ranks; a gradient that no rank has stays None."""
    if not is_distributed():
        return
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    counts = reduce(present, "sum").tolist()
    touched = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
    flat = reduce(torch.cat([_gradient(parameter).flatten() for parameter in touched]), "sum")
    for parameter, summed in zip(touched, flat.split([parameter.numel() for parameter in touched]), strict=True):
        parameter.grad = summed.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
