"""The plan of a run: what its settings come to, without training or allocating anything."""

from typing import NamedTuple

import torch

from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import n_slots
from rwkv_train.data.stored import Corpus
from rwkv_train.errors import ConfigError, DataError, RwkvTrainError
from rwkv_train.models.registry import count_parameters
from rwkv_train.planning.memory import MemoryEstimate, estimate_memory
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.run import open_corpora
from rwkv_train.training.schedule import run_length
from rwkv_train.training.strategy import device_of
from rwkv_train.training.zero_settings import deepspeed_config


class Plan(NamedTuple):
    """What the settings of a run come to."""

    n_parameters: int
    n_steps: int | None
    """``None`` where that depends on a corpus that cannot be opened."""
    tokens_per_step: int
    accumulation: int
    train_tokens: int | None
    """Tokens in the training corpus; ``None`` where it cannot be opened."""
    memory: MemoryEstimate
    device: torch.device
    world_size: int
    backend: str
    """Why the backend of the recurrence was chosen."""
    obstacles: tuple[RwkvTrainError, ...]
    """Why the run could not start here and now."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as names and values for a table."""
        memory = self.memory
        rows = [
            ("parameters", f"{self.n_parameters:,}"),
            ("tokens a step", f"{self.tokens_per_step:,} in {self.accumulation} micro-batches a device"),
        ]
        if self.n_steps is not None:
            tokens = self.n_steps * self.tokens_per_step
            rows += [("steps", f"{self.n_steps:,}"), ("tokens in all", f"{tokens:,}")]
            if self.train_tokens is not None:
                epochs = f"{tokens / self.train_tokens:.2f} epochs of {self.train_tokens:,} tokens"
                rows.append(("training corpus", epochs))
        return [
            *rows,
            ("devices", f"{self.world_size} x {self.device.type}"),
            (
                "memory a device (estimate)",
                f"{memory.total_bytes / 2**30:.2f} GiB: weights, gradients and Adam's moments "
                f"{memory.model_bytes / 2**30:.2f}, activations {memory.activation_bytes / 2**30:.2f}"
                + (f"; {memory.offloaded_bytes / 2**30:.2f} in the CPU's" if memory.offloaded_bytes else ""),
            ),
            ("recurrence", self.backend),
        ]


def make_plan(config: TrainConfig) -> Plan:
    """Work out a plan; the corpus is opened (the built-in one is made if needed), no weights are allocated.

    A corpus, a GPU or a file of DeepSpeed's settings that is not there does not prevent a plan; it is an obstacle that
    the plan names.

    Raises:
        BackendError: ``trainer.wkv_backend`` cannot run there.
    """
    obstacles: list[RwkvTrainError] = []
    train: Corpus | None = None
    try:
        device = device_of(config.trainer)
    except ConfigError as error:
        obstacles.append(error)
        device = torch.device("cuda")
    try:
        train = open_corpora(config).train
    except DataError as error:
        obstacles.append(error)
    try:
        if config.trainer.zero_stage is not None:
            deepspeed_config(config, device)
    except ConfigError as error:
        obstacles.append(error)
    backend = choose_wkv_backend(config, device)
    return Plan(
        n_parameters=count_parameters(config.model),
        n_steps=_steps(config, train),
        tokens_per_step=config.trainer.global_batch_size * config.model.ctx_len,
        accumulation=config.trainer.accumulation,
        train_tokens=None if train is None else train.tokens.n_tokens,
        memory=estimate_memory(config, backend.name),
        device=device,
        world_size=config.trainer.world_size,
        backend=backend.reason,
        obstacles=tuple(obstacles),
    )


def _steps(config: TrainConfig, train: Corpus | None) -> int | None:
    if train is None and config.trainer.max_epochs is not None:
        return None
    slots = 0 if train is None else n_slots(train, config)
    return run_length(config.trainer, config.model.ctx_len, slots).n_steps
