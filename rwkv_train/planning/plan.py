"""The plan of a run: what its settings come to, without training or allocating anything."""

from typing import NamedTuple

import torch

from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import Drawn, Samples
from rwkv_train.errors import RwkvTrainError
from rwkv_train.models.registry import count_parameters
from rwkv_train.planning.memory import MemoryEstimate, estimate_memory
from rwkv_train.planning.problems import Problems
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.corpora import Corpora, open_corpora, open_samples, samples_in_epoch
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
    """Tokens in the training corpora; ``None`` where they cannot be opened, or the run streams."""
    drawn: tuple[Drawn, ...]
    """What the whole run takes from each of several corpora."""
    memory: MemoryEstimate
    device: torch.device
    world_size: int
    backend: str
    """Why the backend of the recurrence was chosen."""
    obstacles: tuple[RwkvTrainError, ...]
    """Why the run could not start here and now."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as names and values for a table."""
        rows = [
            ("parameters", f"{self.n_parameters:,}"),
            tokens_row(self.tokens_per_step, self.accumulation),
        ]
        if self.n_steps is not None:
            tokens = self.n_steps * self.tokens_per_step
            rows += [("steps", f"{self.n_steps:,}"), ("tokens in all", f"{tokens:,}")]
            rows += [
                (f"from {one.name}", f"{one.tokens:,} tokens, {one.epochs:.2f} epochs") for one in self.drawn
            ]
            if self.train_tokens is not None and not self.drawn:
                epochs = f"{tokens / self.train_tokens:.2f} epochs of {self.train_tokens:,} tokens"
                rows.append(("training corpus", epochs))
        return [
            *rows,
            devices_row(self.world_size, self.device),
            memory_row(self.memory),
            ("recurrence", self.backend),
        ]


def tokens_row(tokens_per_step: int, accumulation: int) -> tuple[str, str]:
    """Return the row of a plan that says how large a step is."""
    return "tokens a step", f"{tokens_per_step:,} in {accumulation} micro-batches a device"


def devices_row(world_size: int, device: torch.device) -> tuple[str, str]:
    """Return the row of a plan that says where it runs."""
    return "devices", f"{world_size} x {device.type}"


def memory_row(memory: MemoryEstimate) -> tuple[str, str]:
    """Return the row of a plan that says what a step takes."""
    parts = [
        f"weights {show_bytes(memory.weight_bytes)}",
        f"gradients and Adam's moments {show_bytes(memory.model_bytes - memory.weight_bytes)}",
        f"activations {show_bytes(memory.activation_bytes)}",
    ]
    text = f"{show_bytes(memory.total_bytes)}: {', '.join(parts)}"
    if memory.offloaded_bytes:
        text += f"; {show_bytes(memory.offloaded_bytes)} in the CPU's"
    return "memory a device (estimate)", text


def show_bytes(n_bytes: int) -> str:
    """Write a size in GiB, or in MiB where that is small."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"


def make_plan(config: TrainConfig) -> Plan:
    """Work out a plan; the corpus is opened (the built-in one is made if needed), no weights are allocated.

    A corpus, a GPU or a file of DeepSpeed's settings that is not there does not prevent a plan; it is an obstacle that
    the plan names.

    Raises:
        BackendError: ``trainer.wkv_backend`` cannot run there.
    """
    obstacles = Problems()
    device = obstacles.of(device_of, config.trainer) or torch.device("cuda")
    data = obstacles.of(_open_data, config)
    if config.trainer.zero_stage is not None:
        obstacles.of(deepspeed_config, config, device)
    n_steps = _steps(config, data)
    backend = choose_wkv_backend(config, device)
    return Plan(
        n_parameters=count_parameters(config.model),
        n_steps=n_steps,
        tokens_per_step=config.trainer.global_batch_size * config.model.ctx_len,
        accumulation=config.trainer.accumulation,
        train_tokens=None if data is None else data[0].train_tokens,
        drawn=()
        if data is None or n_steps is None
        else data[1].drawn(n_steps * config.trainer.global_batch_size),
        memory=estimate_memory(config, backend.name),
        device=device,
        world_size=config.trainer.world_size,
        backend=backend.reason,
        obstacles=tuple(obstacles.found),
    )


def _open_data(config: TrainConfig) -> tuple[Corpora, Samples]:
    corpora = open_corpora(config)
    return corpora, open_samples(config, corpora)


def _steps(config: TrainConfig, data: tuple[Corpora, Samples] | None) -> int | None:
    if data is None and config.trainer.max_epochs is not None:
        return None
    slots = 0 if data is None else samples_in_epoch(config, data[0])
    return run_length(config.trainer, config.model.ctx_len, slots).n_steps
