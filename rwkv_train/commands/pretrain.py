"""``rwkv-train pretrain``: train a model from scratch or go on with a run."""

import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.tables import print_table
from rwkv_train.errors import RwkvTrainError

if TYPE_CHECKING:
    from rich.table import Table

    from rwkv_train.config.train import TrainConfig
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


def pretrain(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Resume = "auto",
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model from scratch, or go on from the last checkpoint in out_dir."""
    from rwkv_train.parallel.launch import launch, needs_launch
    from rwkv_train.parallel.world import require_numbers

    require_numbers(os.environ)
    settings = _load_settings(config, overrides or [], dry_run)
    if not dry_run and needs_launch(settings.trainer):
        _log_lines()
        raise typer.Exit(launch(settings.trainer, sys.orig_argv))
    _log_to_stderr()
    if dry_run:
        _print_plan(settings)
        return
    from rwkv_train.parallel.world import rank_of
    from rwkv_train.training.run import run_pretraining

    # "GPU available: False", tips and the like; what we chose we say ourselves. Lightning sets it when it is imported.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    summary = run_pretraining(settings, resume, allow_change or [])
    if rank_of(os.environ) == 0:
        _print_summary(summary)
    if summary.signal is not None:
        raise typer.Exit(128 + summary.signal)


def _load_settings(config: str, overrides: list[str], dry_run: bool) -> "TrainConfig":
    from rwkv_train.parallel.world import is_launched
    from rwkv_train.training.settings import load_settings

    try:
        return load_settings(config, overrides)
    except RwkvTrainError as error:
        if dry_run or not is_launched(os.environ):
            raise
        from rwkv_train.parallel.processes import refuse_together

        refuse_together(error)


def _log_to_stderr() -> None:
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


def _print_plan(settings: "TrainConfig") -> None:
    from rich.console import Console

    from rwkv_train.config.save import to_yaml
    from rwkv_train.planning.plan import make_plan

    typer.echo(to_yaml(settings))
    plan = make_plan(settings)
    Console().print(_table("plan", plan.rows()))
    if plan.obstacles:
        raise RwkvTrainError("; ".join(map(str, plan.obstacles)))


def _print_summary(summary: "RunSummary") -> None:
    print_table(_table("run", summary.rows()))


def _table(title: str, rows: list[tuple[str, str]]) -> "Table":
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    return table
