"""``rwkv-train doctor``: what training needs, what of it is there, and what to do about the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.results import require_writable
from rwkv_train.errors import BackendError

if TYPE_CHECKING:
    from rich.table import Table

    from rwkv_train.planning.doctor.backends import BackendRow
    from rwkv_train.planning.doctor.examine import Report
    from rwkv_train.planning.doctor.finding import Finding

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")]

SECTIONS = (
    ("Machine", ("rwkv_train", "python", "system", "cpu", "memory", "kernel_cache")),
    ("NVIDIA and compilers", ("driver", "chips", "nvcc", "compiler", "ninja")),
    ("Packages", ("requirements", "torch", "lightning", "training", "deepspeed", "deepspeed_ops")),
)
"""Title -> ids of findings; all others are under the last title."""
OTHERS = "Only for some jobs"


def doctor(json_file: JsonFile = None) -> None:
    """Examine this machine and installation; kernels that are missing are built. Exit code 2 if training cannot run."""
    require_writable(json_file)
    try:
        from rwkv_train.planning.doctor.examine import examine
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the package '{error.name}', which rwkv-train needs, is not installed; pip install rwkv-train"
        ) from error
    typer.echo("trying packages and backends; kernels that are not there yet are built", err=True)
    report = examine(lambda sentence: typer.echo(sentence, err=True))
    _print(report)
    if json_file is not None:
        import json

        content = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
        json_file.write_text(
            content, encoding="utf-8"
        )  # what writes atomically wants torch, which may be broken
    if report.obstacles:
        # Said here, because the usual way imports packages that may be what is broken.
        typer.echo("error: training cannot run here; the report names the reasons and the remedies", err=True)
        raise typer.Exit(BackendError.exit_code)


def _print(report: "Report") -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=False)
    console.print(_findings_table(report.findings))
    if report.backends:
        console.print(_backends_table(report.backends))
    n_warnings = sum(finding.status == "warning" for finding in report.findings)
    n_warnings += len(
        {(row.device, row.backend) for row in report.backends if row.status not in ("available", "refuses")}
    )
    warned = f"; {n_warnings} warning{'' if n_warnings == 1 else 's'} above" if n_warnings else ""
    if report.obstacles:
        console.print(f"Training cannot run here{warned}:")
        for obstacle in report.obstacles:
            console.print(f"- {obstacle}")
    else:
        device = "a GPU" if report.device == "cuda" else "the CPU"
        console.print(f"Training can run here, on {device}{warned}.")


def _findings_table(findings: "Sequence[Finding]") -> "Table":
    table = _table("", "what", "found")
    by_id = {finding.id: finding for finding in findings}
    shown = {id_ for _, ids in SECTIONS for id_ in ids}
    rest = [id_ for id_ in by_id if id_ not in shown]
    for title, ids in (*SECTIONS, (OTHERS, rest)):
        table.add_row("", title.upper())
        for finding in (by_id[id_] for id_ in ids if id_ in by_id):
            is_package = title == OTHERS or finding.id == "rwkv_train"
            name = finding.id.replace("_", "-" if is_package else " ")
            table.add_row(finding.status, name, _with_remedy(finding.found, finding.remedy))
        table.add_section()
    return table


def _backends_table(rows: "Sequence[BackendRow]") -> "Table":
    table = _table("device", "backend", "for", "found")
    for cells in join_rows(rows):
        table.add_row(*cells)
    return table


def _table(*names: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in names[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(names[-1], overflow="fold")
    return table


def join_rows(rows: "Sequence[BackendRow]") -> list[list[str]]:
    """Return cells for device, backend, operators and dtypes, verdict: what several of them share is said once."""
    all_ops = ", ".join(dict.fromkeys(row.op for row in rows))
    all_dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    cells: list[tuple[str, ...]] = [
        (row.device, row.backend, row.op, row.dtype, _verdict(row)) for row in rows
    ]
    order = list(dict.fromkeys((row.device, row.backend) for row in rows))
    for column in (3, 2):
        cells = _joined(cells, column)
    cells = _joined(sorted(cells, key=lambda cell: order.index((cell[0], cell[1]))), 0)
    return [
        [
            device,
            backend,
            ("all" if ops == all_ops else ops) + ("" if dtypes == all_dtypes else f" in {dtypes}"),
            verdict,
        ]
        for device, backend, ops, dtypes, verdict in cells
    ]


def _joined(rows: "Sequence[tuple[str, ...]]", column: int) -> "list[tuple[str, ...]]":
    """Join rows that differ in one column only."""
    values: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        values.setdefault((*row[:column], *row[column + 1 :]), []).append(row[column])
    return [(*key[:column], ", ".join(several), *key[column:]) for key, several in values.items()]


def _verdict(row: "BackendRow") -> str:
    if row.status == "available":
        return "available" + (", auto takes it" if row.is_auto else "")
    chosen = " (auto takes it)" if row.is_auto else ""
    return _with_remedy(f"no: {row.reason}{chosen}", row.remedy)


def _with_remedy(found: str, remedy: str | None) -> str:
    return found if remedy is None else f"{found}\n-> {remedy}"
