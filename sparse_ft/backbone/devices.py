"""Select the device and the precision of computations."""

import errno
import re
from pathlib import Path

import torch

from sparse_ft.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into an available device.

    Raises:
        ConfigError: If the name is unknown or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {name!r}. Expected auto, cpu, cuda, cuda:N or mps.") from error
    available = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"Device {name!r} is not available here. Present: {', '.join(present)}. Use --device auto or cpu."
        )
    return device


def find_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the data type of the frozen weights in training.

    Args:
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 if the hardware multiplies in it, else fp32.
        device: Device of the training.
    """
    if precision == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a GPU or the CPU ran out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error)))
