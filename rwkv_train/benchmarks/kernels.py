"""Time the recurrences, backend beside backend."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.errors import BackendError
from rwkv_train.ops.backends import AUTO, Problem, capability_of
from rwkv_train.ops.context import PLAIN, SequenceContext, packed_context
from rwkv_train.ops.prepare import OPERATORS, prepare_backend
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv5 import wkv5
from rwkv_train.ops.wkv6 import wkv6
from rwkv_train.ops.wkv7 import wkv7

N_WARM_UP = 3
"""Calls that are not counted: they build, allocate and wake the threads."""


class KernelSize(NamedTuple):
    """A problem to time. ``wkv4`` has no heads: there ``H`` is 1 and ``N`` the width."""

    op: str
    B: int
    T: int
    H: int
    N: int
    packed: bool = False
    """All tokens in one row, in sequences each half as long as the one before, down to one token."""


STANDARD_SIZES = (
    KernelSize("wkv7", B=4, T=512, H=12, N=64),
    KernelSize("wkv7", B=4, T=512, H=12, N=64, packed=True),
    KernelSize("wkv7", B=12, T=64, H=2, N=64),
    KernelSize("wkv6", B=4, T=512, H=12, N=64),
    KernelSize("wkv6", B=4, T=512, H=12, N=64, packed=True),
    KernelSize("wkv6", B=12, T=64, H=2, N=64),
    KernelSize("wkv5", B=4, T=512, H=12, N=64),
    KernelSize("wkv5", B=4, T=512, H=12, N=64, packed=True),
    KernelSize("wkv5", B=12, T=64, H=2, N=64),
    KernelSize("wkv4", B=4, T=512, H=1, N=768),
    KernelSize("wkv4", B=4, T=512, H=1, N=768, packed=True),
    KernelSize("wkv4", B=12, T=64, H=1, N=128),
)

RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "wkv4": wkv4,
    "wkv5": wkv5,
    "wkv6": wkv6,
    "wkv7": wkv7,
}

Row = dict[str, str | int | float]
Kind = tuple[str, str]
"""Backend and pass."""


def bench_kernels(
    sizes: Sequence[KernelSize] = STANDARD_SIZES,
    backends: Sequence[str] = (AUTO, "torch"),
    repeats: int = 20,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Time forward, and forward with backward, of each operator.

    The backends take turns in every repeat, so that what else the machine does falls on all of them alike.

    Args:
        sizes: the problems.
        backends: names as the operators take them; ``"auto"`` is reported under the name it stands for.
        repeats: timed calls of each kind; the median is reported.
        device: where the tensors lie.
        dtype: dtype of all inputs but the log decay and the state, which are float32.

    Returns:
        One row for each size, backend and pass: ``op``, ``backend``, ``B``, ``T``, ``H``, ``N``, ``packed``,
        ``device``, ``dtype``, ``pass`` (``"forward"`` or ``"forward+backward"``), ``repeats``, ``ms`` (median) and
        ``min_ms``.

    Raises:
        BackendError: an operator or a backend is unknown, or cannot run a size.
    """
    device = torch.device(device)
    rows: list[Row] = []
    for size in sizes:
        if size.op not in OPERATORS:
            raise BackendError(f"there is no operator '{size.op}'; choose one of {', '.join(OPERATORS)}")
        head_size = None if size.op == "wkv4" else size.N
        problem = Problem(device.type, dtype, head_size, size.packed, capability_of(device))
        names = list(dict.fromkeys(prepare_backend(size.op, problem, name).name for name in backends))
        inputs, dy = _inputs(size, device, dtype)
        context = packed_context(_halving(size.B * size.T).to(device)) if size.packed else PLAIN
        calls = {
            (name, kind): _call(size.op, name, kind, inputs, dy, context)
            for name in names
            for kind in ("forward", "forward+backward")
        }
        seconds = _time_in_turns(calls, repeats, device)
        for (name, kind), times in seconds.items():
            rows.append(
                {
                    **size._asdict(),
                    "backend": name,
                    "pass": kind,
                    "device": device.type,
                    "dtype": str(dtype).removeprefix("torch."),
                    "repeats": repeats,
                    "ms": round(statistics.median(times) * 1e3, 4),
                    "min_ms": round(min(times) * 1e3, 4),
                }
            )
    return rows


def _time_in_turns(
    calls: Mapping[Kind, Callable[[], None]], repeats: int, device: torch.device
) -> dict[Kind, list[float]]:
    seconds: dict[Kind, list[float]] = {key: [] for key in calls}
    for turn in range(N_WARM_UP + repeats):
        for key, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn >= N_WARM_UP:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _halving(n_tokens: int) -> Tensor:
    """Return where sequences start of which each takes half of the tokens that are left, the last one all."""
    starts = [0]
    while starts[-1] < n_tokens:
        starts.append(starts[-1] + (n_tokens - starts[-1] + 1) // 2)
    return torch.tensor(starts)


def _call(
    op: str, backend: str, kind: str, inputs: Sequence[Tensor], dy: Tensor, context: SequenceContext
) -> Callable[[], None]:
    def run() -> Tensor:
        return RECURRENCES[op](*inputs, None, context, backend=backend)[0]

    def forward() -> None:
        with torch.no_grad():
            run()

    def forward_and_backward() -> None:
        torch.autograd.grad(run(), inputs, dy)

    return forward if kind == "forward" else forward_and_backward


def _inputs(size: KernelSize, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return inputs as a model makes them, and a gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (1, size.B * size.T) if size.packed else (size.B, size.T)
    shape: tuple[int, ...] = (*rows, size.H, size.N)
    if size.op == "wkv7":
        w = -0.6065 * torch.sigmoid(random(*shape))
        key = F.normalize(random(*shape), dim=-1)
        others = [random(*shape), random(*shape), random(*shape), -key, key * torch.sigmoid(random(*shape))]
        inputs = [others[0], w, *others[1:]]
    elif size.op == "wkv4":
        shape = (*rows, size.N)
        w = -torch.exp(random(size.N))
        inputs = [w, random(size.N), random(*shape), random(*shape)]
    else:
        by_head = (size.H, size.N)
        w = -torch.exp(random(*(by_head if size.op == "wkv5" else shape)) - 3)
        inputs = [random(*shape), w, random(*shape), random(*shape), random(*by_head)]
    inputs = [x.to(device, torch.float32 if x is w else dtype).requires_grad_() for x in inputs]
    return inputs, random(*shape).to(device, dtype)
