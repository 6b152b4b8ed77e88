"""``rwkv-train finetune``: let a model learn from conversations, whole or in part."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from rwkv_train.commands.run import (
    AllowChange,
    ConfigName,
    Overrides,
    Resume,
    quiet_lightning,
    train,
)

if TYPE_CHECKING:
    from rwkv_train.config.finetune import FinetuneConfig
    from rwkv_train.training.run import RunSummary


def finetune(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Resume = "auto",
    allow_change: AllowChange = None,
) -> None:
    """Finetune a model on conversations, or go on from the last checkpoint in out_dir."""
    from rwkv_train.training.settings import load_finetune_settings

    train(lambda: load_finetune_settings(config, overrides or []), _run, resume, allow_change or [])


def _run(settings: "FinetuneConfig", resume: str, allow_change: Collection[str]) -> "RunSummary":
    from rwkv_train.training.finetuning import run_finetuning

    quiet_lightning()
    return run_finetuning(settings, resume, allow_change)
