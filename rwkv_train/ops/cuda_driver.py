"""What the NVIDIA driver of this machine says: its version and the chips it shows us. Needs no torch."""

import ctypes
from typing import NamedTuple

DRIVER = "libcuda.so.1"
"""The driver's library; it comes with the driver, never with a toolkit."""
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_NO_DEVICE = 100

Version = tuple[int, int]
"""Of CUDA, (major, minor)."""


class Chip(NamedTuple):
    """One device."""

    name: str
    architecture: str
    """What kernels for it are compiled for, as nvcc writes it: ``"sm_90"``."""


class Driver(NamedTuple):
    """A driver that answers, or the reason why there is none."""

    cuda: Version | None
    """The newest CUDA that it runs."""
    chips: tuple[Chip, ...]
    """The devices that this process may use (``CUDA_VISIBLE_DEVICES``)."""
    problem: str | None
    """Why there are no chips, and what to do."""


def ask_driver(library: str = DRIVER) -> Driver:
    """Return what the driver says. Makes no context on any device and takes none of its memory."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return Driver(None, (), f"there is no NVIDIA driver here ({library} was not found); install one")
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return Driver(None, (), "the NVIDIA driver does not say its version; install it anew")
    cuda = (number.value // 1000, number.value % 1000 // 10)
    if error := driver.cuInit(0):
        return Driver(cuda, (), _why_not(driver, error))
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0:
        return Driver(cuda, (), _why_not(driver, _NO_DEVICE))
    return Driver(cuda, tuple(_chip(driver, ordinal) for ordinal in range(count.value)), None)


def _chip(driver: ctypes.CDLL, ordinal: int) -> Chip:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    for value, attribute in ((major, _COMPUTE_CAPABILITY_MAJOR), (minor, _COMPUTE_CAPABILITY_MINOR)):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Chip(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")


def _why_not(driver: ctypes.CDLL, error: int) -> str:
    if error == _NO_DEVICE:
        return "the NVIDIA driver shows no chip; see nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set"
    text = ctypes.c_char_p()
    driver.cuGetErrorString(error, ctypes.byref(text))
    reason = text.value.decode(errors="replace") if text.value else f"error {error}"
    return f"the NVIDIA driver does not start ({reason}); see nvidia-smi"
