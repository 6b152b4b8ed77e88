"""What a device is: its name, by which tables of measured speeds are found, and what code it takes."""

import functools
import platform
from pathlib import Path

import torch

from rwkv_train.ops.tracing import constant_when_traced

_CPU_INFO = Path("/proc/cpuinfo")


def chip_name(device: torch.device) -> str | None:
    """Return the name of a device: of a GPU what torch says (``"NVIDIA H200"``), of a CPU its model.

    ``None`` where no CUDA device can be asked, and for any other device. Safe to trace.
    """
    name: str | None = None
    if device.type == "cpu":
        name = _name_of_cpu()
    elif device.type == "cuda":
        name = _name_of_gpu(device.index)
    return name


def capability_of(device: torch.device) -> int | None:
    """Return the compute capability of a CUDA device, 86 for sm_86. Safe to trace.

    ``None`` for any other device, of which CUDA is not asked, and where no CUDA device can be asked.
    """
    capability: int | None = None
    if device.type == "cuda":
        capability = _capability_of_gpu(device.index)
    return capability


# Traced code asks once, while it is traced.
@constant_when_traced
def _name_of_cpu() -> str:
    return _cpu_model()


@constant_when_traced
def _name_of_gpu(index: int | None) -> str | None:
    return _gpu(index)[0]


@constant_when_traced
def _capability_of_gpu(index: int | None) -> int | None:
    return _gpu(index)[1]


@functools.cache
def _cpu_model() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpu(index: int | None) -> tuple[str | None, int | None]:
    """Return name and capability of a CUDA device, of the current one if ``None``."""
    if index is not None:
        return _known_gpu(index)  # asked for every layer of a step of generation
    return _known_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else (None, None)


@functools.cache
def _known_gpu(index: int) -> tuple[str | None, int | None]:
    if not torch.cuda.is_available():  # as with tensors that only show what would be computed elsewhere
        return None, None
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), 10 * major + minor
