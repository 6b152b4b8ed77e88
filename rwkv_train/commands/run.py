"""What the commands that train have in common: options, log, processes, summary."""

import logging
import os
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rwkv_train.commands.tables import print_table
from rwkv_train.errors import RwkvTrainError

if TYPE_CHECKING:
    from rich.table import Table

    from rwkv_train.config.run import RunConfig
    from rwkv_train.training.run import RunSummary

ConfigName = Annotated[
    str, typer.Option("--config", metavar="FILE", help="A YAML file, or the name of a shipped preset.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one setting, e.g. optim.lr=3e-4; repeatable."),
]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|none|PATH",
        help="Go on from the newest checkpoint in out_dir if there is one, from scratch, or from this checkpoint.",
    ),
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Go on with another value of this setting, e.g. optim.lr; repeatable."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the settings and what they come to; train nothing.")
]

ConfigT = TypeVar("ConfigT", bound="RunConfig")


def train(
    load: Callable[[], ConfigT],
    run: Callable[[ConfigT, str, Collection[str]], "RunSummary"],
    resume: str,
    allow_change: Collection[str],
) -> None:
    """Load settings, start the processes that they ask for, train in each, and print what it came to.

    Args:
        load: reads the settings.
        run: trains in this process.
        resume: where to go on from.
        allow_change: settings that may differ from those of the checkpoint.
    """
    from rwkv_train.parallel.launch import launch, needs_launch
    from rwkv_train.parallel.world import rank_of, require_numbers

    require_numbers(os.environ)
    settings = _load_together(load)
    if needs_launch(settings.trainer):
        _log_lines()
        raise typer.Exit(launch(settings.trainer, sys.orig_argv))
    log_to_stderr()
    summary = run(settings, resume, allow_change)
    if rank_of(os.environ) == 0:
        print_table(rows_table("run", summary.rows()))
    if summary.signal is not None:
        raise typer.Exit(128 + summary.signal)


def quiet_lightning() -> None:
    """Leave out "GPU available: False", tips and the like; what we chose we say ourselves.

    Lightning sets the level when it is imported, so this comes after.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _load_together(load: Callable[[], ConfigT]) -> ConfigT:
    from rwkv_train.parallel.world import is_launched

    try:
        return load()
    except RwkvTrainError as error:
        if not is_launched(os.environ):
            raise
        from rwkv_train.parallel.processes import refuse_together

        refuse_together(error)


def log_to_stderr() -> None:
    """Show what the package logs."""
    from rich.logging import RichHandler

    from rwkv_train.training.progress import stderr_console

    if stderr_console().is_terminal:
        handler = RichHandler(
            console=stderr_console(), show_level=False, show_path=False, markup=False, highlighter=None
        )
        _log_to(handler)
    else:
        _log_lines()


def _log_lines() -> None:
    """Log one line a message, whatever its length."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    _log_to(handler)


def _log_to(handler: logging.Handler) -> None:
    from rwkv_train.parallel.world import rank_of

    handler.setLevel(logging.INFO if rank_of(os.environ) == 0 else logging.WARNING)
    package = logging.getLogger("rwkv_train")
    package.setLevel(logging.INFO)
    package.addHandler(handler)


def print_plan(rows: list[tuple[str, str]]) -> None:
    """Print what settings come to, as wide as the terminal: its values are sentences."""
    from rich.console import Console

    Console(markup=False, highlight=False).print(rows_table("plan", rows))


def rows_table(title: str, rows: list[tuple[str, str]]) -> "Table":
    """Return a table of names and values."""
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    return table
