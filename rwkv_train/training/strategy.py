"""From our settings to Lightning's Trainer."""

import warnings
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16-autocast": "bf16-mixed"}
"""Our names, said by what they do, and Lightning's."""


def process_rank() -> int:
    """Return the number of this process among those of the run; Lightning reads it from the environment."""
    return int(getattr(rank_zero_only, "rank", None) or 0)


def device_of(settings: TrainerConfig) -> torch.device:
    """Return the kind of device that the settings choose on this machine.

    Raises:
        ConfigError: a GPU is asked for and there is none, or fewer than ``devices``.
    """
    if settings.accelerator == "cpu":
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if settings.accelerator == "auto" and n_gpus == 0:
        return torch.device("cpu")
    if n_gpus < settings.devices:
        raise ConfigError(
            f"the run needs {settings.devices} GPUs (trainer.devices) but this machine has {n_gpus}; lower it, or "
            "set trainer.accelerator to 'cpu'"
        )
    return torch.device("cuda")


def make_trainer(
    settings: TrainerConfig, n_steps: int, callbacks: list[Callback], loggers: list[Logger]
) -> Trainer:
    """Build the Trainer for ``n_steps`` optimizer steps; checkpoints, validation and display are ours.

    Raises:
        ConfigError: a device is missing; or this process of several nodes does not know its number.
    """
    rank = process_rank()
    # Lightning advises more loader workers; reading a memory-mapped slice needs none.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning calls a function of torch under its old name.
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    trainer = Trainer(
        accelerator="cpu" if device_of(settings).type == "cpu" else "gpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(settings),
        precision=PRECISIONS[settings.precision],
        max_steps=n_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulation,
        callbacks=callbacks,
        logger=loggers,
        log_every_n_steps=1,  # ours decide; Lightning only warns of intervals longer than the run
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    if trainer.global_rank != rank:  # Lightning's own launcher counts on each node from 0
        raise ConfigError(
            f"trainer.num_nodes is {settings.num_nodes}, and this process does not know its number among those of "
            "all nodes; start it with torchrun or with SLURM's srun on each node"
        )
    return trainer


def _strategy(settings: TrainerConfig) -> Strategy | Literal["auto"]:
    if settings.world_size == 1 and settings.strategy == "auto":
        return "auto"
    return DDPStrategy()
