"""``rwkv-train checkpoints``: what a run has saved, whether it is whole, and what of it stays."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.tables import print_table
from rwkv_train.errors import CheckpointError

if TYPE_CHECKING:
    from rwkv_train.checkpoints.overview import SavedCheckpoint

checkpoints = typer.Typer(
    help="List, verify and prune the training checkpoints of a run.", no_args_is_help=True
)

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="out_dir of a run.")]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="DIR", help="out_dir of a run, or the folder of one checkpoint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
KeepLast = Annotated[int, typer.Option(min=1, help="How many of those saved last stay.")]
KeepEvery = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Checkpoints whose step is a multiple of N stay.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")]


@checkpoints.command("list")
def list_(folder: RunFolder, as_json: AsJson = False) -> None:
    """Show what a run has saved. Files are not read; see verify."""
    from rwkv_train.checkpoints.overview import list_run

    saved = list_run(folder)
    if as_json:
        import json

        typer.echo(json.dumps([checkpoint._asdict() for checkpoint in saved], indent=2))
        return
    _print_rows(
        ["checkpoint", "step", "tokens", "saved (UTC)", "size", "validation loss", ""],
        [_cells(checkpoint) for checkpoint in saved],
    )


@checkpoints.command()
def verify(folder: RunOrCheckpoint, as_json: AsJson = False) -> None:
    """Compare each file of each checkpoint with its hash; exit code 2 if one is damaged."""
    from rwkv_train.checkpoints.overview import verify_checkpoints

    verified = verify_checkpoints(folder)
    if as_json:
        import json

        content = [{**result._asdict(), "folder": str(result.folder)} for result in verified]
        typer.echo(json.dumps(content, indent=2))
    else:
        _print_rows(
            ["checkpoint", "found"],
            [[result.folder.name, "\n".join(result.problems) or "whole"] for result in verified],
        )
    damaged = [f"{result.folder.name}/{name}" for result in verified for name in result.damaged]
    if damaged:
        raise CheckpointError(
            f"{folder}: damaged: {', '.join(damaged)}; restore from a copy, or remove these checkpoints (a run goes "
            "on from the newest whole one)"
        )


@checkpoints.command()
def prune(
    folder: RunFolder, keep_last: KeepLast, keep_every: KeepEvery = None, dry_run: DryRun = False
) -> None:
    """Remove checkpoints; the best one and the newest whole one always stay."""
    from rwkv_train.checkpoints.retention import prune_run

    removed = prune_run(folder, keep_last, keep_every_n_steps=keep_every, dry_run=dry_run)
    for checkpoint in removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {checkpoint}")
    if not removed:
        typer.echo("nothing to remove")


def _cells(saved: "SavedCheckpoint") -> list[str]:
    return [
        saved.name,
        "?" if saved.step is None else f"{saved.step:,}",
        "?" if saved.tokens is None else f"{saved.tokens:,}",
        "?" if saved.saved_at is None else saved.saved_at[:19].replace("T", " "),
        f"{saved.size_bytes / 1e6:,.1f} MB",
        "" if saved.validation_loss is None else f"{saved.validation_loss:.4f}",
        ", ".join(saved.marks),
    ]


def _print_rows(header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table()
    for name in header:
        table.add_column(name, justify="right" if name in {"step", "tokens", "size"} else "left")
    for row in rows:
        table.add_row(*row)
    print_table(table)
