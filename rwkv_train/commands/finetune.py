"""``rwkv-train finetune``: let a model learn from conversations, whole or in part."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import typer

from rwkv_train.commands.run import (
    AllowChange,
    ConfigName,
    DryRun,
    Overrides,
    Resume,
    log_to_stderr,
    print_plan,
    quiet_lightning,
    train,
)
from rwkv_train.errors import RwkvTrainError

if TYPE_CHECKING:
    from rwkv_train.config.finetune import FinetuneConfig
    from rwkv_train.training.run import RunSummary


def finetune(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Resume = "auto",
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
) -> None:
    """Finetune a model on conversations, or go on from the last checkpoint in out_dir."""
    from rwkv_train.training.settings import load_finetune_settings

    if dry_run:
        _dry_run(config, overrides or [], resume, allow_change or [])
    else:
        train(lambda: load_finetune_settings(config, overrides or []), _run, resume, allow_change or [])


def _run(settings: "FinetuneConfig", resume: str, allow_change: Collection[str]) -> "RunSummary":
    from rwkv_train.training.finetuning import run_finetuning

    quiet_lightning()
    return run_finetuning(settings, resume, allow_change)


def _dry_run(config: str, overrides: list[str], resume: str, allow_change: list[str]) -> None:
    from rwkv_train.config.save import to_yaml
    from rwkv_train.planning.finetune_plan import make_finetune_plan
    from rwkv_train.training.settings import read_finetune_settings

    log_to_stderr()
    settings, unreadable = read_finetune_settings(config, overrides)
    plan, problems = make_finetune_plan(settings, unreadable, resume, allow_change)
    if plan is None:
        for problem in problems:
            typer.echo(f"error: {' '.join(str(problem).split())}", err=True)
        raise typer.Exit(RwkvTrainError.exit_code)
    typer.echo(to_yaml(settings))
    print_plan(plan.rows())
