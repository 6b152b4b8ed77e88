"""The plan of a run: what its settings come to, without training or allocating anything."""

from typing import NamedTuple

import torch

from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import n_slots
from rwkv_train.models.registry import count_parameters
from rwkv_train.planning.memory import MemoryEstimate, estimate_memory
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.run import open_corpora
from rwkv_train.training.schedule import total_steps
from rwkv_train.training.strategy import device_of


class Plan(NamedTuple):
    """What the settings of a run come to."""

    n_parameters: int
    n_steps: int
    tokens_per_step: int
    accumulation: int
    train_tokens: int
    """Tokens in the training corpus."""
    memory: MemoryEstimate
    device: torch.device
    world_size: int
    backend: str
    """Why the backend of the recurrence was chosen."""

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.n_steps * self.tokens_per_step

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as names and values for a table."""
        memory = self.memory
        return [
            ("parameters", f"{self.n_parameters:,}"),
            ("training corpus", f"{self.train_tokens:,} tokens"),
            ("steps", f"{self.n_steps:,}"),
            ("tokens a step", f"{self.tokens_per_step:,} in {self.accumulation} micro-batches a device"),
            ("tokens in all", f"{self.tokens:,} = {self.tokens / self.train_tokens:.2f} epochs"),
            ("devices", f"{self.world_size} x {self.device.type}"),
            (
                "memory a device (estimate)",
                f"{memory.total_bytes / 2**30:.2f} GiB: weights, gradients and Adam's moments "
                f"{memory.model_bytes / 2**30:.2f}, activations {memory.activation_bytes / 2**30:.2f}",
            ),
            ("recurrence", self.backend),
        ]


def make_plan(config: TrainConfig) -> Plan:
    """Work out a plan; the corpus is opened (the built-in one is made if needed), no weights are allocated.

    Raises:
        ConfigError, DataError, BackendError: as the run itself would.
    """
    corpora = open_corpora(config)
    device = device_of(config.trainer)
    backend = choose_wkv_backend(config, device)
    return Plan(
        n_parameters=count_parameters(config.model),
        n_steps=total_steps(
            config.trainer, config.model.ctx_len, n_slots(corpora.train, config.model.ctx_len)
        ),
        tokens_per_step=config.trainer.global_batch_size * config.model.ctx_len,
        accumulation=config.trainer.accumulation,
        train_tokens=corpora.train.tokens.n_tokens,
        memory=estimate_memory(config, device, backend.name),
        device=device,
        world_size=config.trainer.world_size,
        backend=backend.reason,
    )
