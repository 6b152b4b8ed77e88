"""What a machine can do at best, measured: the roofs of a roofline."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from rwkv_train.benchmarks.stopwatch import Stopwatch, cache_bytes

N_MEASUREMENTS = 7
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}
MATRIX_WIDTH = {"cpu": 1024, "cuda": 8192}


class MachineLimits(NamedTuple):
    """Rates of one device, from the median time of a large copy and of a large matrix product."""

    copy_bytes_per_second: float
    """Bytes read and bytes written both count."""
    matmul_operations_per_second: float
    """Of a square product in the dtype of the measured values; a product and a sum are two."""


def measure_limits(device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch) -> MachineLimits:
    """Measure how fast a device copies and multiplies.

    Args:
        device: where.
        dtype: of the matrices.
        stopwatch: measures one call.
    """
    n_bytes = max(COPIED_BYTES[device.type], cache_bytes(device))
    source = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_seconds = _median_seconds(stopwatch, lambda: target.copy_(source))

    width = MATRIX_WIDTH[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(width, width, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul_seconds = _median_seconds(stopwatch, lambda: torch.mm(a, b, out=product))
    return MachineLimits(2 * 4 * len(source) / copy_seconds, 2 * width**3 / matmul_seconds)


def _median_seconds(stopwatch: Stopwatch, call: Callable[[], object]) -> float:
    call()
    return statistics.median(stopwatch(call) for _ in range(N_MEASUREMENTS))
