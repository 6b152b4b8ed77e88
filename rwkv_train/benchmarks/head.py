"""The time and memory of the loss of the head: with all logits at once, and in chunks."""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.models.lm import NO_TARGET
from rwkv_train.ops.cross_entropy import linear_cross_entropy


class Size(NamedTuple):
    """Tokens, width and vocabulary of a head."""

    n_rows: int
    n_embd: int
    vocab_size: int


STANDARD_CPU = (Size(2048, 512, 65_536),)
STANDARD_GPU = (Size(32_768, 768, 65_536), Size(32_768, 2048, 65_536))

_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x, weight, targets) -> losses``, of ``[R, C]``, ``[V, C]``, ``[R]``."""


def _all_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=NO_TARGET, reduction="none")


def _in_chunks(*, keep_logits: bool) -> Loss:
    def losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, ignore_index=NO_TARGET, keep_logits=keep_logits)[0]

    return losses


WAYS: dict[str, Loss] = {
    "all logits": _all_logits,
    "chunks, kept": _in_chunks(keep_logits=True),
    "chunks, computed again": _in_chunks(keep_logits=False),
}
"""What is compared, the plain one first."""


def bench_head(
    size: Size,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 5,
    warmup: int = 1,
) -> list[dict[str, Any]]:
    """Measure losses and their gradients, each way in turn.

    Args:
        size: of the head; targets are random, and weigh differently.
        device: where to run.
        dtype: dtype of input and weight.
        repeats: calls that are measured; the median counts.
        warmup: calls before those.

    Returns:
        One row for each of ``WAYS``: sizes, milliseconds of forward and backward, ``peak_mib``, the memory that a call
        takes beyond its inputs (``None`` where the system does not tell), and ``difference``, the largest one of a
        gradient from the first row's, as part of the largest value.
    """
    inputs = [tensor.to(device) for tensor in _inputs(size, dtype)]
    rows, times = [], {name: [] for name in WAYS}  # type: ignore[var-annotated]
    expected: list[Tensor] = []
    for name, loss in WAYS.items():
        take_peak = _peak_meter(device)
        _, gradients = _call(loss, *inputs)
        peak_bytes = take_peak()
        expected = expected or gradients
        row = {"way": name, "dtype": str(dtype).removeprefix("torch."), **size._asdict()}
        row["peak_mib"] = None if peak_bytes is None else peak_bytes / 2**20
        row["difference"] = max(map(_difference, gradients, expected))
        rows.append(row)
        del gradients
    for i in range(warmup + repeats):
        for name, loss in WAYS.items():  # in turn, so that a machine that slows down slows all of them
            measured, _ = _call(loss, *inputs)
            if i >= warmup:
                times[name].append(measured)
    for row in rows:
        for part, seconds in zip(
            ("forward_ms", "backward_ms"), zip(*times[row["way"]], strict=True), strict=True
        ):
            row[part] = 1e3 * statistics.median(seconds)
    return rows


def _inputs(size: Size, dtype: torch.dtype) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(size.n_rows, size.n_embd, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(size.vocab_size, size.n_embd, generator=generator) / size.n_embd**0.5
    yield weight.to(dtype).requires_grad_()
    yield torch.randint(size.vocab_size, (size.n_rows,), generator=generator)
    yield torch.rand(size.n_rows, generator=generator) / size.n_rows


def _call(
    loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, d_losses: Tensor
) -> tuple[tuple[float, float], list[Tensor]]:
    """Return the seconds of forward and backward, and both gradients."""
    start = _now(x.device)
    losses = loss(x, weight, targets)
    middle = _now(x.device)
    gradients = torch.autograd.grad(losses, (x, weight), d_losses)
    return (middle - start, _now(x.device) - middle), list(gradients)


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_meter(device: torch.device) -> Callable[[], int | None]:
    """Return what tells the most memory that was taken since this call, beyond what was then."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    try:
        _CLEAR_PEAK.write_text("5", encoding="ascii")  # Linux: the peak is what there is now
        resident = _kib("VmRSS")
    except OSError:
        return lambda: None
    return lambda: 1024 * (_kib("VmHWM") - resident)


def _kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1])
