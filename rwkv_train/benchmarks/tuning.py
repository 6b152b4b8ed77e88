"""Measure where one backend overtakes another, and write what ``"auto"`` chooses by: the table of a chip."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rwkv_train.benchmarks.contenders import is_out_of_memory
from rwkv_train.benchmarks.kernel_counts import PASSES
from rwkv_train.benchmarks.kernel_sizes import NO_HEADS, KernelSize
from rwkv_train.benchmarks.kernels import Row, bench_kernels, default_backends, problem_of_size
from rwkv_train.benchmarks.stopwatch import Stopwatch
from rwkv_train.errors import BackendError
from rwkv_train.ops.crossover import FORMAT, Chip
from rwkv_train.ops.prepare import OPERATORS, prepare_backend

LARGEST_DIFFERENCE = 0.05
"""Of a result from the first backend's, norm over norm: ten times what bfloat16 may cost a kernel. What is further off
is wrong, and must not be chosen for its speed."""
MOST_HEADS = 32
"""Of a row. More recurrences than that stand in several rows; to the kernels both are the same."""
CHANNELS_FOR_A_HEAD = 64
"""Channels of the operator without heads in the place of one head."""

Report = Callable[[str], object]
"""Is told a line of progress."""
Json = dict[str, Any]


class Grid(NamedTuple):
    """The sizes of a table: for each head size all pairs of a number of heads and one of tokens."""

    head_sizes: Sequence[int]
    n_heads: Sequence[int]
    """Of all rows (B H)."""
    n_tokens: Sequence[int]
    """Of a row (T)."""
    most_numbers: int
    """Numbers in one tensor of all tokens. Larger sizes are not in the grid."""


GRIDS = {
    "cpu": Grid((64,), (2, 8, 32), (1, 16, 128), 2**20),
    # From a step of generation to a long text, from a few heads to several for each multiprocessor.
    "cuda": Grid((64, 128), (8, 16, 32, 64, 128, 256, 512), (1, 16, *(2**i for i in range(7, 16))), 2**28),
}
"""What is measured on each kind of device."""


class Tuned(NamedTuple):
    """What was measured of one operator in one dtype, as it stands in the file."""

    op: str
    dtype: str
    cases: list[Json]
    """One for each head size and pass, with its points."""
    left_out: list[str]
    """A sentence for each measurement that came to nothing."""


def tuning_sizes(op: str, grid: Grid) -> dict[int | None, list[KernelSize]]:
    """Return the sizes of a grid for an operator, by head size."""

    def sizes(head_size: int) -> list[KernelSize]:
        return [
            _size(op, n_heads, n_tokens, head_size)
            for n_heads in grid.n_heads
            for n_tokens in grid.n_tokens
            if n_heads * n_tokens * head_size <= grid.most_numbers
        ]

    if op == NO_HEADS:
        return {None: sizes(CHANNELS_FOR_A_HEAD)}
    return {head_size: sizes(head_size) for head_size in grid.head_sizes}


def tune(
    op: str,
    grid: Grid,
    repeats: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    stopwatch: Stopwatch,
    report: Report,
) -> Tuned:
    """Time all backends that ``"auto"`` may choose for an operator, but for the loop over tokens.

    What cannot be loaded here, does not fit into memory, computes something else or cannot be compared is left out,
    and that is reported.

    Args:
        op: name of the operator.
        grid: the sizes.
        repeats: timed calls of each; the least time is kept, to which what else the machine does only adds.
        device: where.
        dtype: of all inputs but the log decay and the state.
        stopwatch: measures one call.
        report: is told of every size.
    """
    cases: list[Json] = []
    left_out: list[str] = []

    def leave_out(what: str) -> None:
        left_out.append(what)
        report(what)

    can_load = _Loader(op, leave_out)
    for head_size, sizes in tuning_sizes(op, grid).items():
        points: dict[str, list[Json]] = {kind: [] for kind in PASSES}
        run: dict[str, None] = {}
        for size in sizes:
            names = [
                name
                for name in default_backends(size, device, dtype)
                if OPERATORS[op][name].in_auto and can_load(name, size, device, dtype)
            ]
            run |= dict.fromkeys(names)
            try:
                rows = bench_kernels([size], names, repeats, device=device, dtype=dtype, stopwatch=stopwatch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                leave_out(f"{op} {size.label} does not fit into memory")
                continue
            for kind, times in _times(rows, leave_out).items():
                points[kind].append(_point(size, times))
                report(f"{op} {size.label} {kind}: {_in_words(times)}")
        cases += [
            {"head_size": head_size, "pass": kind, "backends": list(run), "points": found}
            for kind, found in points.items()
        ]
    return Tuned(op, str(dtype).removeprefix("torch."), cases, left_out)


def add_measured(
    measured: Sequence[Json], tuned: Tuned, environment: Mapping[str, Any], repeats: int
) -> list[Json]:
    """Return the entries of a table with a new one, which replaces what is there of its operator and dtype. Pure.

    Args:
        measured: the entries, as :func:`rwkv_train.ops.crossover.read_measured` reads them.
        tuned: what the new one says.
        environment: of :func:`rwkv_train.benchmarks.environment.describe_environment`, when it was measured.
        repeats: timed calls of each of its measurements.
    """
    entry = {
        "op": tuned.op,
        "dtype": tuned.dtype,
        "environment": dict(environment),
        "repeats": repeats,
        "left_out": tuned.left_out,
        "cases": tuned.cases,
    }
    return list({(found["op"], found["dtype"]): found for found in [*measured, entry]}.values())


def table_text(chip: Chip, measured: Sequence[Json]) -> str:
    """Return the file of a chip's table, as :mod:`rwkv_train.ops.crossover` reads it, one point a line.

    Args:
        chip: what was measured.
        measured: the entries, of :func:`add_measured`.
    """
    head = {"format": FORMAT, "chip": chip.name, "capability": chip.capability}
    entries = ",\n".join(_entry_text(entry) for entry in measured)
    return f'{_opened(head, indent=1)},\n "measured": [\n{entries}\n ]\n}}\n'


def count_fastest(case: Mapping[str, Any]) -> dict[str, int]:
    """Return at how many points of a case each backend is the fastest."""
    fastest = [min(point["ms"], key=point["ms"].get) for point in case["points"]]
    return {name: fastest.count(name) for name in dict.fromkeys(fastest)}


class _Loader:
    """Tries each backend once, and says of those that cannot be loaded why."""

    def __init__(self, op: str, leave_out: Report) -> None:
        self._op = op
        self._leave_out = leave_out
        self._known: dict[str, bool] = {}

    def __call__(self, name: str, size: KernelSize, device: torch.device, dtype: torch.dtype) -> bool:
        if name not in self._known:
            try:
                prepare_backend(self._op, problem_of_size(size, device, dtype), name)
                self._known[name] = True
            except BackendError as error:
                self._leave_out(f"{self._op} {name}: {error}")
                self._known[name] = False
        return self._known[name]


def _size(op: str, n_heads: int, n_tokens: int, head_size: int) -> KernelSize:
    n_rows = max(1, n_heads // MOST_HEADS)
    heads = n_heads // n_rows
    if op == NO_HEADS:
        return KernelSize(op, n_rows, n_tokens, 1, heads * head_size)
    return KernelSize(op, n_rows, n_tokens, heads, head_size)


def _times(rows: Sequence[Row], leave_out: Report) -> dict[str, dict[str, float]]:
    """Return for each pass the milliseconds of each backend that may be chosen; of the others it is told why not."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        difference, milliseconds = row["difference"], row["min_ms"]
        why_not = row["failed"]
        if why_not is None and not isinstance(difference, float):
            why_not = f"{rows[0]['backend']}, which its result is held to, did not run"
        elif isinstance(difference, float) and difference > LARGEST_DIFFERENCE:
            why_not = f"its result differs by {difference:.2g} from that of {rows[0]['backend']}"
        if why_not is None and isinstance(milliseconds, float) and milliseconds > 0:
            times.setdefault(str(row["pass"]), {})[str(row["backend"])] = milliseconds
        else:
            label = KernelSize(*(row[field] for field in KernelSize._fields)).label  # type: ignore[arg-type]
            leave_out(f"{row['op']} {label} {row['backend']} {row['pass']}: {why_not or 'it took no time'}")
    return times


def _point(size: KernelSize, times: dict[str, float]) -> Json:
    width = size.N if size.op == NO_HEADS else size.H
    return {"recurrences": size.B * width, "tokens": size.T, "ms": times}


def _in_words(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {times[name]:.3g} ms" for name in sorted(times, key=times.__getitem__))


def _entry_text(entry: Json) -> str:
    head = {name: value for name, value in entry.items() if name != "cases"}
    cases = ",\n".join(_case_text(case) for case in entry["cases"])
    return f'{_opened(head, indent=1)},\n "cases": [\n{cases}\n ]}}'


def _case_text(case: Json) -> str:
    head = {name: value for name, value in case.items() if name != "points"}
    points = ",\n".join(f"   {json.dumps(point)}" for point in case["points"])
    return f'  {_opened(head)}, "points": [\n{points}\n  ]}}'


def _opened(head: Json, indent: int | None = None) -> str:
    """Return an object in JSON without its end, so that more can follow."""
    return json.dumps(head, indent=indent, ensure_ascii=False).removesuffix("}").rstrip("\n")
