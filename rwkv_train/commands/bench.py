"""``rwkv-train bench``: measure the recurrences and whole training steps on this machine."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv_train.commands.inference import Device, find_device
from rwkv_train.commands.tables import print_table

if TYPE_CHECKING:
    import torch
    from rich.table import Table


class What(StrEnum):
    """What is measured."""

    KERNELS = "kernels"
    TRAINING = "training"


Subject = Annotated[What, typer.Argument(help="The recurrences alone, or whole training steps.")]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", metavar="NAME", help="May be repeated. By default torch, and cpp on a CPU."),
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements after a warm-up; the median counts.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the measurements to this file.")
]


_SAME_IN_EVERY_ROW = frozenset({"device", "dtype", "repeats"})
"""Written to the file, but not worth a column on a terminal."""


def bench(
    what: Subject,
    backend: Backends = None,
    repeats: Repeats = 5,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure the recurrences or whole training steps of several backends, in turn within one process."""
    from rwkv_train.benchmarks.environment import describe_environment

    place = find_device(device)
    backends = backend or (["torch", "cpp"] if place.type == "cpu" else ["torch"])
    rows = _measure(what, backends, repeats, place)
    print_table(_table(what.value, rows))
    if json_file is not None:
        _write(json_file, {"environment": describe_environment(place), "results": rows})
        typer.echo(f"wrote {json_file}")


def _measure(what: What, backends: list[str], repeats: int, device: "torch.device") -> list[dict[str, Any]]:
    if what is What.TRAINING:
        from rwkv_train.benchmarks.training import STANDARD, bench_training

        return [
            row
            for case in STANDARD
            for row in bench_training(case, backends=backends, device=device, repeats=repeats)
        ]
    from rwkv_train.benchmarks.kernels import STANDARD_SIZES, bench_kernels

    return [dict(row) for row in bench_kernels(STANDARD_SIZES, backends, repeats, device=device)]


def _table(title: str, rows: list[dict[str, Any]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = [name for name in rows[0] if name not in _SAME_IN_EVERY_ROW]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        is_number = isinstance(rows[0][name], int | float)
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*map(_cell, (row[name] for name in shown)))
    return table


def _cell(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
