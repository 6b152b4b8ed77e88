"""The settings of one training run: the tree that a YAML file holds."""

from pydantic import Field

from rwkv_train.config.base import Config
from rwkv_train.config.checkpoint import CheckpointConfig
from rwkv_train.config.data import DataConfig
from rwkv_train.config.guard import GuardConfig
from rwkv_train.config.model import ModelConfig
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.trainer import TrainerConfig


class TrainConfig(Config):
    """One run of ``rwkv-train pretrain``."""

    model: ModelConfig
    """The architecture and its sizes."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The corpus."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    trainer: TrainerConfig
    """The run."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """What is kept."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """What happens to a bad step."""
