"""The settings that runs of every kind have: pretraining and finetuning."""

from typing import Self

from pydantic import Field, model_validator

from rwkv_train.config.base import Config
from rwkv_train.config.checkpoint import CheckpointConfig
from rwkv_train.config.guard import GuardConfig
from rwkv_train.config.model import ModelConfig
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.trainer import TrainerConfig


class RunConfig(Config):
    """One run of training."""

    model: ModelConfig
    """The architecture and its sizes."""
    data: Config
    """What it learns from; each kind of run has its own."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    trainer: TrainerConfig
    """The run."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """What is kept."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """What happens to a bad step."""

    @model_validator(mode="after")
    def _deepspeeds_optimizer_needs_deepspeed(self) -> Self:
        if self.optim.implementation == "deepspeed" and self.trainer.zero_stage is None:
            raise ValueError(
                f"optim.implementation 'deepspeed' needs trainer.strategy deepspeed_1, _2 or _3, not "
                f"{self.trainer.strategy!r}; set it to 'torch'"
            )
        return self

    @property
    def is_packed(self) -> bool:
        """Whether a sample holds several sequences, each with a state of its own."""
        return True

    @property
    def lr_factors(self) -> dict[str, float]:
        """Factors of the learning rate by patterns of parameters' names; the last that fits counts."""
        return {}
