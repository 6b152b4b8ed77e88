"""From our settings to Lightning's Trainer, its strategy and our engine."""

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from rwkv_train.config.run import RunConfig
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError
from rwkv_train.training.engine import Engine
from rwkv_train.training.fsdp import FsdpEngine, make_fsdp_strategy
from rwkv_train.training.zero import ExactInputPrecision, ZeroEngine, make_zero_strategy

ENGINES: Mapping[str, type[Engine]] = {
    "auto": Engine,
    "ddp": Engine,
    "fsdp2": FsdpEngine,
    "deepspeed_1": ZeroEngine,
    "deepspeed_2": ZeroEngine,
    "deepspeed_3": ZeroEngine,
}
"""Name of a strategy -> what is different about it."""


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
    config: RunConfig, n_steps: int, callbacks: list[Callback], loggers: list[Logger]
) -> Trainer:
    """Build the Trainer for ``n_steps`` optimizer steps; checkpoints, validation and display are ours.

    Raises:
        ConfigError: a device or DeepSpeed is missing, or DeepSpeed's settings contradict ours.
    """
    settings = config.trainer
    device = device_of(settings)
    # Lightning advises more loader workers; reading a memory-mapped slice needs none.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning calls a function of torch under its old name.
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    # The engine knows that DeepSpeed clips by itself.
    warnings.filterwarnings("ignore", "Since DeepSpeed handles gradient clipping internally.*")
    # PyTorch 2.13 has another name for it, which 2.11 does not know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    is_bf16_in_deepspeed = settings.zero_stage is not None and settings.precision == "bf16-params"
    return Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(config, device),
        # However the processes were started, they have torchrun's variables by now. Named, because Lightning would
        # find SLURM's too, and then requeue the job by itself.
        plugins=[
            TorchElasticEnvironment() if settings.world_size > 1 else LightningEnvironment(),
            *([ExactInputPrecision()] if is_bf16_in_deepspeed else []),
        ],
        # Precision is ours, the same under every strategy; only DeepSpeed has to hold its parameters in bfloat16.
        precision=None if is_bf16_in_deepspeed else "32-true",
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


def _strategy(config: RunConfig, device: torch.device) -> Strategy | Literal["auto"]:
    settings = config.trainer
    if settings.zero_stage is not None:
        return make_zero_strategy(config, device)
    if settings.strategy == "fsdp2":
        return make_fsdp_strategy(settings)
    if settings.strategy == "auto" and settings.world_size == 1:
        return "auto"
    # The only buffers are codes of quantized weights, which every process makes alike.
    return DDPStrategy(broadcast_buffers=False)
