"""What a device is called, as tables of measured speeds name it."""

import functools
import platform
from pathlib import Path

import torch

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


# Traced code asks once, while it is traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of_cpu() -> str:
    return _cpu_model()


@functools.cache
def _cpu_model() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of_gpu(index: int | None) -> str | None:
    if not torch.cuda.is_available():  # as with tensors that only show what would be computed elsewhere
        return None
    return str(torch.cuda.get_device_name(index))
