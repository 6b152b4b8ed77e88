"""The part of ``rwkv-train bench`` that times recurrences: its options, its tables and its picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv_train.commands.inference import DtypeName
from rwkv_train.commands.results import write_whole
from rwkv_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from rwkv_train.ops.crossover import Chip

Ops = Annotated[
    list[str] | None,
    typer.Option("--op", metavar="NAME", help="For kernels: wkv4 to wkv7. May be repeated. By default all."),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        metavar="SIZE",
        help="For kernels, in place of the usual sizes: B8T4096H32N64 is 8 rows of 4,096 tokens, 32 heads of 64 "
        "channels; -packed after it puts sequences into one row; B8T4096C2048 is for wkv4 alone. May be repeated.",
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        metavar="[OP=]MODULE:FUNCTION",
        help="For kernels: a function to measure beside ours. It takes the operator's inputs in our order but the "
        "state, for packed rows also cu_seqlens=, and returns y and the final state. May be repeated.",
    ),
]
KernelDtype = Annotated[
    DtypeName | None,
    typer.Option(
        "--dtype", help="For kernels: of all inputs but the log decay. By default bf16 on a GPU, else fp32."
    ),
]
PlotFile = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="For kernels: draw rates under the machine's roofs, .png or .svg."
    ),
]

Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="For kernels: measure over a grid of sizes which backend is the fastest on this chip, and write the table "
        "that auto chooses by. With --op, --dtype and --repeats.",
    ),
]
TableFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="With --tune: the table. By default where auto finds it: in the folder of the built kernels, under the "
        "name of the chip.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="With --tune, where the table exists: replace its times of what is measured (--op, --dtype) and keep all "
        "others. What is no table of this chip is replaced whole.",
    ),
]

_PICTURES = (".png", ".svg")


def require_picture(path: Path | None) -> None:
    """Refuse a picture of a kind that cannot be drawn.

    Raises:
        ConfigError: the file has another ending.
    """
    if path is not None and path.suffix not in _PICTURES:
        raise ConfigError(
            f"--plot {path} must end in {' or '.join(_PICTURES)}, which says the kind of picture"
        )


def measure_kernels(
    backends: list[str] | None,
    ops: list[str] | None,
    sizes: list[str] | None,
    peers: list[str] | None,
    dtype: DtypeName | None,
    repeats: int,
    device: "torch.device",
) -> dict[str, Any]:
    """Return ``limits``, the rates of the machine, ``peers``, their versions, and ``results``, the rows.

    All of JSON's types.

    Raises:
        ConfigError: an option names what is not there, or a size does not fit into memory.
        BackendError: a backend cannot run a size.
    """
    from rwkv_train.benchmarks.contenders import is_out_of_memory
    from rwkv_train.benchmarks.kernel_peers import importable_peers, load_peer, peer_versions
    from rwkv_train.benchmarks.kernel_sizes import choose_sizes
    from rwkv_train.benchmarks.kernels import (
        DEFAULT_DTYPES,
        bench_kernels,
        default_backends,
        resolve_backends,
    )
    from rwkv_train.benchmarks.machine_limits import measure_limits
    from rwkv_train.benchmarks.stopwatch import cache_bytes, cold_stopwatch
    from rwkv_train.checkpoints.tensors import DTYPES

    chosen = choose_sizes(device.type, ops, sizes)
    given = [load_peer(peer, ops) for peer in peers or ()]
    of_values = DEFAULT_DTYPES[device.type] if dtype is None else DTYPES[dtype.value]
    names = {size: backends or default_backends(size, device, of_values) for size in chosen}
    for size in chosen:
        resolve_backends([size], names[size], device, of_values)
    known, left_out = importable_peers(device.type)
    if left_out is not None:
        typer.echo(left_out, err=True)

    stopwatch = cold_stopwatch(device)
    limits = measure_limits(device, of_values, stopwatch)
    rows = []
    for size in chosen:
        try:
            rows += bench_kernels(
                [size],
                names[size],
                repeats,
                device=device,
                dtype=of_values,
                peers=[*known, *given],
                limits=limits,
                stopwatch=stopwatch,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"{size.op} {size.label} does not fit into memory; give a smaller --size"
            ) from error
        typer.echo(f"{size.op} {size.label}: done", err=True)
    return {
        "limits": {
            "copy_gb_per_second": round(limits.copy_bytes_per_second * 1e-9, 2),
            "matmul_gop_per_second": round(limits.matmul_operations_per_second * 1e-9, 2),
            "matmul_dtype": str(of_values).removeprefix("torch."),
            "cache_bytes": cache_bytes(device),
        },
        "peers": peer_versions() if known else {},
        "results": rows,
    }


def tuning_target(
    output: Path | None, device: "torch.device", *, overwrite: bool
) -> tuple[Path, list[dict[str, Any]]]:
    """Return the file that a table of a device goes to, and the entries that are in it.

    There are none where it is no table of this device, which is said.

    Raises:
        ConfigError: it is there already, and is not to be overwritten or cannot be read.
        BackendError: the user has no home, where it would go by default.
    """
    from rwkv_train.ops.crossover import read_measured, user_folder

    chip = _chip_of(device)
    path = output or user_folder() / chip.file_name
    if not path.is_file():
        return path, []
    if not overwrite:
        raise ConfigError(
            f"{path} is already there; choose another --output, or replace its times of what is measured now with "
            "--overwrite"
        )
    try:
        return path, read_measured(path, chip)
    except OSError as error:
        raise ConfigError(
            f"--output {path} cannot be read, to keep what is in it: {error.strerror}"
        ) from error
    except ValueError as error:
        typer.echo(f"{path} will be replaced whole: {error}", err=True)
        return path, []


def tune_kernels(
    ops: list[str] | None,
    dtype: DtypeName | None,
    repeats: int,
    device: "torch.device",
    path: Path,
    measured: list[dict[str, Any]],
    environment: "Mapping[str, Any]",
) -> list[dict[str, Any]]:
    """Measure for a chip's table and write it, whole, after each operator; return what to show of what was measured.

    What is in the table (``measured``) of other operators and dtypes stays.

    Raises:
        ConfigError: there is no such operator.
    """
    from rwkv_train.benchmarks.kernel_sizes import choose_sizes
    from rwkv_train.benchmarks.kernels import DEFAULT_DTYPES
    from rwkv_train.benchmarks.stopwatch import cold_stopwatch
    from rwkv_train.benchmarks.tuning import GRIDS, add_measured, count_fastest, table_text, tune
    from rwkv_train.checkpoints.tensors import DTYPES

    chosen = dict.fromkeys(size.op for size in choose_sizes(device.type, ops))
    of_values = DEFAULT_DTYPES[device.type] if dtype is None else DTYPES[dtype.value]
    stopwatch = cold_stopwatch(device)
    tuned = []
    for op in chosen:
        tuned.append(
            tune(
                op,
                GRIDS[device.type],
                repeats,
                device=device,
                dtype=of_values,
                stopwatch=stopwatch,
                report=lambda line: typer.echo(line, err=True),
            )
        )
        measured = add_measured(measured, tuned[-1], environment, repeats)
        # Python's escapes of what is not UTF-8 in the command are JSON's too.
        write_whole(path, table_text(_chip_of(device), measured).encode(errors="backslashreplace"))
        typer.echo(f"{op} is in {path}", err=True)
    return [
        {
            "op": found.op,
            "head size": case["head_size"],
            "pass": case["pass"],
            "sizes": len(case["points"]),
            "fastest": ", ".join(f"{name} at {n}" for name, n in count_fastest(case).items()),
        }
        for found in tuned
        for case in found.cases
    ]


def _chip_of(device: "torch.device") -> "Chip":
    from rwkv_train.ops.chip import capability_of, chip_name
    from rwkv_train.ops.crossover import Chip

    name = chip_name(device)
    assert name is not None  # a device that was found has one
    return Chip(name, capability_of(device))


def kernel_table(measured: "Mapping[str, Any]") -> tuple[str, list[dict[str, Any]]]:
    """Return the title and the rows of the table on a terminal, which leaves out what only a program wants."""
    limits, rows = measured["limits"], measured["results"]
    title = (
        f"kernels, {rows[0]['dtype']} on {rows[0]['device']}; here a copy moves "
        f"{limits['copy_gb_per_second']:,.1f} GB/s, a matrix product computes "
        f"{limits['matmul_gop_per_second']:,.0f} Gop/s"
    )
    columns = [
        {
            "op": row["op"],
            "size": _label(row),
            "backend": row["backend"],
            "pass": row["pass"],
            "ms": row["ms"],
            "min_ms": row["min_ms"],
            "% of copy": _scaled(row["of_copy"], 100),
            "% of matmul": _scaled(row["of_matmul"], 100),
            "peak MB": _scaled(row["peak_bytes"], 1e-6),
            "difference": None if row["difference"] is None else f"{row['difference']:.1e}",
        }
        for row in rows
    ]
    if all(row["peak MB"] is None for row in columns):
        for row in columns:
            del row["peak MB"]
    return title, columns


def kernel_failures(measured: "Mapping[str, Any]") -> list[str]:
    """Return a line for each row that failed; in a column they would make the table wider than a terminal."""
    return [
        f"{row['op']} {_label(row)} {row['backend']} {row['pass']} failed: {row['failed']}"
        for row in measured["results"]
        if row["failed"] is not None
    ]


def write_roofline(path: Path, measured: "Mapping[str, Any]", machine: str) -> None:
    """Draw what was measured into a file of the kind that its name says.

    Raises:
        ConfigError: nothing could be measured.
    """
    from rwkv_train.benchmarks.machine_limits import MachineLimits
    from rwkv_train.benchmarks.roofline import draw_roofline

    limits = MachineLimits(
        copy_bytes_per_second=measured["limits"]["copy_gb_per_second"] * 1e9,
        matmul_operations_per_second=measured["limits"]["matmul_gop_per_second"] * 1e9,
    )
    title = f"{machine}, {measured['limits']['matmul_dtype']}"
    write_whole(path, draw_roofline(measured["results"], limits, title, path.suffix[1:]))


def _label(row: "Mapping[str, Any]") -> str:
    from rwkv_train.benchmarks.kernel_sizes import KernelSize

    return KernelSize(*(row[field] for field in KernelSize._fields)).label


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
