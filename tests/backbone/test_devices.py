import errno
import pathlib

import pytest
import torch

from sparse_ft.backbone.devices import find_device, find_dtype, is_out_of_memory
from sparse_ft.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == GPU


def test_a_device_that_is_there_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        assert find_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu0", "CPU", "tpu:1"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(
        ConfigError, match=rf"(Unknown device '{name}'\. Expected auto, cpu, cuda, cuda:N or mps|'{name}' is not avail)"
    ):
        find_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta", "xpu"])
def test_a_device_that_is_not_there_is_refused_and_those_present_are_named(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=rf"Device '{name}' is not available here\. Present: cpu, cuda:0, cuda:1\. Use --device auto"
    ):
        find_device(name)


def test_precision_is_as_asked_for_and_auto_follows_the_hardware(monkeypatch):
    assert find_dtype("fp32", CPU) == find_dtype("fp32", GPU) == torch.float32
    assert find_dtype("bf16", CPU) == find_dtype("bf16", GPU) == torch.bfloat16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, found=supported: found)
        assert find_dtype("auto", GPU) == dtype
    assert find_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_tile", torch.bfloat16),
        ("fpu avx2 amx_bf16", torch.bfloat16),
        ("fpu avx2 avx512f avx512_vnni", torch.float32),
        (None, torch.float32),  # no /proc/cpuinfo
    ],
)
def test_auto_on_a_cpu_is_bf16_if_it_has_the_instructions(monkeypatch, flags, dtype):
    def read_text(path, **_):
        assert str(path) == "/proc/cpuinfo"
        if flags is None:
            raise FileNotFoundError(path)
        return f"flags\t\t: {flags}\n"

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert find_dtype("auto", CPU) == dtype


def test_out_of_memory_is_told_from_other_errors():
    def allocate():
        torch.empty(1 << 60)

    with pytest.raises(RuntimeError) as caught:
        allocate()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(KeyboardInterrupt())
