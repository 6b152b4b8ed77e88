"""Time the recurrences: backend beside backend, and beside other implementations, on the same inputs in turns."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rwkv_train.benchmarks.contenders import (
    Call,
    Contender,
    backend_contender,
    is_out_of_memory,
    keep_values,
    largest_difference,
    look_at,
    make_call,
    peer_contender,
    restore_values,
)
from rwkv_train.benchmarks.kernel_counts import PASSES, count_operations, minimum_bytes
from rwkv_train.benchmarks.kernel_inputs import KernelInputs, make_inputs
from rwkv_train.benchmarks.kernel_peers import Peer, first_line
from rwkv_train.benchmarks.kernel_sizes import CPU_SIZES, NO_HEADS, KernelSize
from rwkv_train.benchmarks.machine_limits import MachineLimits
from rwkv_train.benchmarks.stopwatch import Stopwatch, cold_stopwatch
from rwkv_train.errors import BackendError, ConfigError
from rwkv_train.ops.backends import AUTO, Problem
from rwkv_train.ops.chip import capability_of, chip_name
from rwkv_train.ops.crossover import power_of_two_near
from rwkv_train.ops.prepare import OPERATORS, prepare_backend

N_WARM_UP = 3
"""Calls that are not timed: they build, tune, allocate and wake the threads. The last one of them is looked at."""

DEFAULT_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

_YARDSTICKS = ("cuda_exact", "torch")
"""Where one of them runs, the first is what the others' results are compared with: they compute in float32."""
_DEFINITION = "reference"
"""Too slow to be worth a measurement."""

Row = dict[str, str | int | float | None]
Kind = tuple[str, str]
"""Name of a contender, and pass."""


def problem_of_size(size: KernelSize, device: torch.device, dtype: torch.dtype) -> Problem:
    """Return the problem that an operator has with inputs of a size, a backward pass with it."""
    n_sequences = len(size.starts) - 1
    return Problem(
        device.type,
        dtype,
        None if size.op == NO_HEADS else size.N,
        size.packed,
        capability_of(device),
        chip_name(device),
        power_of_two_near(n_sequences * (size.N if size.op == NO_HEADS else size.H)),
        power_of_two_near(size.B * size.T // n_sequences),
        needs_backward=True,
    )


def default_backends(size: KernelSize, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of all backends that take a size, but for the loop over tokens. Nothing is loaded.

    The first is what the others' results are compared with; they follow in the order of the operator's table.
    """
    problem = problem_of_size(size, device, dtype)
    names = [name for name, backend in OPERATORS[size.op].items() if backend.refuses(problem) is None]
    names.remove(_DEFINITION)
    yardstick = next((name for name in _YARDSTICKS if name in names), names[0])
    return [yardstick, *(name for name in names if name != yardstick)]


def resolve_backends(
    sizes: Sequence[KernelSize], backends: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[list[str]]:
    """Return the names of the backends of each size, loaded and each once; ``"auto"`` under its name.

    Raises:
        BackendError: an operator or a backend is unknown, or cannot run a size.
    """
    resolved: list[list[str]] = []
    for size in sizes:
        if size.op not in OPERATORS:
            raise BackendError(f"there is no operator '{size.op}'; choose one of {', '.join(OPERATORS)}")
        problem = problem_of_size(size, device, dtype)
        names = (prepare_backend(size.op, problem, name).name for name in backends)
        resolved.append(list(dict.fromkeys(names)))
    return resolved


def bench_kernels(
    sizes: Sequence[KernelSize] = CPU_SIZES,
    backends: Sequence[str] = (AUTO, "torch"),
    repeats: int = 20,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    peers: Sequence[Peer] = (),
    limits: MachineLimits | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Row]:
    """Time forward, and forward with backward, of each operator.

    All take turns in every repeat, so that what else the machine does falls on all of them alike.

    Args:
        sizes: the problems.
        backends: names as the operators take them; ``"auto"`` is reported under the name it stands for. The first
            one is what results are compared with.
        repeats: timed calls of each kind; the median is reported.
        device: where the tensors lie.
        dtype: dtype of all inputs but the log decay and the state, which are float32.
        peers: other implementations. Of one that fails, the row says why and has no time.
        limits: what the device can do; ``None`` leaves out the parts of it that were achieved.
        stopwatch: measures one call; ``None`` stands for that of the device, with cold caches.

    Returns:
        One row for each size, backend and pass: ``op``, ``B``, ``T``, ``H``, ``N``, ``packed``, ``backend`` (or
        the peer's name), ``pass`` (``"forward"`` or ``"forward+backward"``), ``device``, ``dtype``, ``repeats``,
        ``ms`` (median) and ``min_ms``; then

        - ``bytes`` and ``operations``: what the call must move and compute, by
          :mod:`rwkv_train.benchmarks.kernel_counts`; over the median time, ``gb_per_second`` and
          ``gflop_per_second``; ``of_copy`` and ``of_matmul``, their parts of ``limits``;
        - ``peak_bytes``: memory that the call takes beyond its inputs, on a GPU;
        - ``difference``: of y, or of the gradient that differs most, from that of the first backend: norm of the
          difference over norm;
        - ``failed``: why there is no time, or why there is no difference.

    Raises:
        BackendError: an operator or a backend is unknown, or cannot run a size.
        ConfigError: two that are measured have one name.
    """
    device = torch.device(device)
    chosen = resolve_backends(sizes, backends, device, dtype)
    for size, names in zip(sizes, chosen, strict=True):
        _require_different(size.op, [*names, *(peer.name for peer in peers if peer.op == size.op)])
    stopwatch = stopwatch or cold_stopwatch(device)
    rows: list[Row] = []
    for size, names in zip(sizes, chosen, strict=True):
        inputs = make_inputs(size, device, dtype)
        contenders = [backend_contender(size.op, name, inputs) for name in names]
        contenders += [peer_contender(peer, inputs) for peer in peers if peer.op == size.op]
        calls, seen = _warm_up(contenders, inputs, device)
        seconds = _time_in_turns(contenders, calls, seen, repeats, stopwatch)
        for key, found in seen.items():
            name, kind = key
            row: Row = {
                **size._asdict(),
                "backend": name,
                "pass": kind,
                "device": device.type,
                "dtype": str(dtype).removeprefix("torch."),
                "repeats": repeats,
            }
            rows.append(row | _rates(size, kind, dtype, seconds.get(key), limits) | found)
    return rows


def _require_different(op: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two implementations of {op} are called {name}; give one of them another name")


def _warm_up(
    contenders: Sequence[Contender], inputs: KernelInputs, device: torch.device
) -> tuple[dict[Kind, Call], dict[Kind, Row]]:
    """Return the calls that work, and the last columns of a row for each, also for those that do not."""
    calls: dict[Kind, Call] = {}
    seen: dict[Kind, Row] = {}
    expected: dict[str, tuple[Tensor, ...]] = {}
    for contender in contenders:
        for kind in PASSES:
            key, call = (contender.name, kind), make_call(contender, kind, inputs)
            row: Row = {"peak_bytes": None, "difference": None, "failed": None}
            seen[key] = row
            kept = None if contender.is_ours else keep_values(inputs)
            with _failure_in(row, contender):
                for _ in range(N_WARM_UP - 1):
                    call()
                result, row["peak_bytes"] = look_at(call, device)
                if contender is contenders[0]:
                    expected[kind] = result
                if kind in expected:
                    row |= _compare(result, expected[kind])
                calls[key] = call
            if kept is not None and restore_values(inputs, kept):
                # Its time would be of other work than the others', and so would theirs be after each of its turns.
                row |= {"difference": None, "failed": "it changes its inputs"}
                calls.pop(key, None)
    return calls, seen


@contextmanager
def _failure_in(row: Row, contender: Contender) -> Iterator[None]:
    """Write into the row what went wrong, unless it is an error of ours."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # Foreign code may raise anything, or exit, and must not end the run; and memory may not suffice for all.
        if contender.is_ours and not is_out_of_memory(error):
            raise
        row["failed"] = first_line(error)


def _compare(result: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    difference = largest_difference(result, expected)
    if not math.isfinite(difference):  # which JSON cannot say
        return {"failed": "a result is not finite"}
    return {"difference": float(f"{difference:.3g}")}


def _time_in_turns(
    contenders: Sequence[Contender],
    calls: Mapping[Kind, Call],
    seen: Mapping[Kind, Row],
    repeats: int,
    stopwatch: Stopwatch,
) -> dict[Kind, list[float]]:
    """Return the seconds of each call that never fails; of one that does, the row says why."""
    by_name = {contender.name: contender for contender in contenders}
    seconds: dict[Kind, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key in list(seconds):
            taken = None
            with _failure_in(seen[key], by_name[key[0]]):
                taken = stopwatch(calls[key])
            if taken is None:
                del seconds[key]
            else:
                seconds[key].append(taken)
    return seconds


def _rates(
    size: KernelSize,
    kind: str,
    dtype: torch.dtype,
    seconds: Sequence[float] | None,
    limits: MachineLimits | None,
) -> Row:
    n_bytes, operations = minimum_bytes(size, kind, dtype.itemsize), count_operations(size, kind)
    row: Row = {
        "ms": None,
        "min_ms": None,
        "bytes": n_bytes,
        "operations": operations,
        "gb_per_second": None,
        "gflop_per_second": None,
        "of_copy": None,
        "of_matmul": None,
    }
    if seconds is None:
        return row
    median = statistics.median(seconds)
    row |= {
        "ms": round(median * 1e3, 4),
        "min_ms": round(min(seconds) * 1e3, 4),
        "gb_per_second": round(n_bytes / median * 1e-9, 3),
        "gflop_per_second": round(operations / median * 1e-9, 3),
    }
    if limits is not None:
        row["of_copy"] = round(n_bytes / median / limits.copy_bytes_per_second, 5)
        row["of_matmul"] = round(operations / median / limits.matmul_operations_per_second, 5)
    return row
