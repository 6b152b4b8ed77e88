"""``rwkv-train pretrain``: train a model from scratch or go on with a run."""

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
    from rwkv_train.config.train import TrainConfig
    from rwkv_train.training.run import RunSummary


def pretrain(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Resume = "auto",
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model from scratch, or go on from the last checkpoint in out_dir."""
    from rwkv_train.training.settings import load_settings

    if dry_run:
        _print_plan(load_settings(config, overrides or []))
    else:
        train(lambda: load_settings(config, overrides or []), _run, resume, allow_change or [])


def _run(settings: "TrainConfig", resume: str, allow_change: Collection[str]) -> "RunSummary":
    from rwkv_train.training.run import run_pretraining

    quiet_lightning()
    return run_pretraining(settings, resume, allow_change)


def _print_plan(settings: "TrainConfig") -> None:
    from rwkv_train.config.save import to_yaml
    from rwkv_train.planning.plan import make_plan

    log_to_stderr()
    typer.echo(to_yaml(settings))
    plan = make_plan(settings)
    print_plan(plan.rows())
    if plan.obstacles:
        raise RwkvTrainError("; ".join(map(str, plan.obstacles)))
