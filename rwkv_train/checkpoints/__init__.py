"""Weights and training checkpoints on disk: safe to read, whole or absent, convertible bit for bit."""

from rwkv_train.checkpoints.convert import Conversion, convert
from rwkv_train.checkpoints.describe import Description, describe_checkpoint
from rwkv_train.checkpoints.infer import infer_config
from rwkv_train.checkpoints.training_state import (
    TrainingState,
    decode_random_state,
    encode_random_state,
    list_training_checkpoints,
    load_training_checkpoint,
    newest_valid_checkpoint,
    prune_training_checkpoints,
    save_training_checkpoint,
)
from rwkv_train.checkpoints.weights import (
    Weights,
    load_model,
    locate_checkpoint,
    read_weights,
    write_pth,
    write_safetensors,
)

__all__ = [
    "Conversion",
    "Description",
    "TrainingState",
    "Weights",
    "convert",
    "decode_random_state",
    "describe_checkpoint",
    "encode_random_state",
    "infer_config",
    "list_training_checkpoints",
    "load_model",
    "load_training_checkpoint",
    "locate_checkpoint",
    "newest_valid_checkpoint",
    "prune_training_checkpoints",
    "read_weights",
    "save_training_checkpoint",
    "write_pth",
    "write_safetensors",
]
