"""Time a call whose data lie in no cache, on a CPU or a GPU."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs a call once, from cold caches, and returns its seconds."""

HEAD_START_SECONDS = 3e-3
"""A GPU is kept busy for so long before a timed call, while Python hands it the call's kernels: so their own time
is measured and not that of handing them over. What waits for the GPU meanwhile loses this."""
UNKNOWN_CACHE_BYTES = 64 * 2**20

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cache_bytes(device: torch.device) -> int:
    """Return the size of the largest cache of a device; of a CPU that does not tell it, 64 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text(encoding="utf-8") for path in _CPU_CACHES.glob("index*/size")]
    return max((_bytes(size) for size in sizes), default=UNKNOWN_CACHE_BYTES)


def cold_stopwatch(device: torch.device) -> Stopwatch:
    """Return what times calls on a device, each after a buffer larger than its caches was written."""
    n_numbers = cache_bytes(device) * 5 // 4 // 4
    buffer = torch.zeros(n_numbers, dtype=torch.float32, device=device)
    return _cuda_stopwatch(buffer) if device.type == "cuda" else _cpu_stopwatch(buffer)


def _cpu_stopwatch(buffer: torch.Tensor) -> Stopwatch:
    def seconds_of(call: Callable[[], object]) -> float:
        buffer.add_(1)  # not zero_(), which may write past the caches
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds_of


def _cuda_stopwatch(buffer: torch.Tensor) -> Stopwatch:
    def timed(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def sweep(n_sweeps: int) -> None:
        for _ in range(n_sweeps):
            buffer.add_(1)

    with torch.cuda.device(buffer.device):
        sweep(3)
        n_sweeps = max(1, math.ceil(HEAD_START_SECONDS / (timed(lambda: sweep(10)) / 10)))

    def seconds_of(call: Callable[[], object]) -> float:
        with torch.cuda.device(buffer.device):
            sweep(n_sweeps)
            return timed(call)

    return seconds_of


def _bytes(size: str) -> int:
    """Read what Linux writes of a cache: ``2048K``."""
    match = re.fullmatch(r"(\d+)([KMG]?)", size.strip())
    return int(match[1]) * 1024 ** " KMG".index(match[2] or " ") if match else 0
