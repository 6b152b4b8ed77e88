"""``rwkv-train bench``: measure the recurrences and whole training steps on this machine."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


class What(StrEnum):
    """What is measured."""

    KERNELS = "kernels"
    TRAINING = "training"


Subject = Annotated[What, typer.Argument(help="The recurrences alone, or whole training steps.")]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", metavar="NAME", help="A backend of the recurrence; repeatable. Default: torch and cpp."),
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements after a warm-up; the median counts.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the measurements to this file.")
]


def bench(what: Subject, backend: Backends = None, repeats: Repeats = 5, json: JsonFile = None) -> None:
    """Measure the recurrences or whole training steps of several backends, in turn within one process."""
    from rich.console import Console

    from rwkv_train.benchmarks.environment import describe_environment

    measure = _measure_kernels if what is What.KERNELS else _measure_training
    rows = measure(backend or ["torch", "cpp"], repeats)
    Console().print(_table(what.value, rows))
    if json is not None:
        _write(json, {"environment": describe_environment(), "results": rows})
        typer.echo(f"wrote {json}")


def _table(title: str, rows: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def _write(path: Path, content: dict[str, Any]) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
