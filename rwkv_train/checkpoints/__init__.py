"""Weights and training checkpoints on disk: safe to read, whole or absent, convertible bit for bit."""

from rwkv_train.checkpoints.adapter_note import AdapterNote
from rwkv_train.checkpoints.adapters import Adapter, read_adapter
from rwkv_train.checkpoints.convert import Conversion, convert
from rwkv_train.checkpoints.describe import Description, describe_checkpoint
from rwkv_train.checkpoints.fingerprint import fingerprint
from rwkv_train.checkpoints.infer import infer_config
from rwkv_train.checkpoints.io import require_space
from rwkv_train.checkpoints.manifest import decode_random_state, encode_random_state
from rwkv_train.checkpoints.merging import merge, merge_into
from rwkv_train.checkpoints.retention import prune_training_checkpoints
from rwkv_train.checkpoints.run_folder import list_training_checkpoints, newest_valid_checkpoint
from rwkv_train.checkpoints.training_state import (
    ParameterState,
    TrainingCheckpoint,
    TrainingState,
    checkpoint_bytes,
    load_training_checkpoint,
    open_training_checkpoint,
    save_training_checkpoint,
)
from rwkv_train.checkpoints.weights import (
    Weights,
    load_model,
    locate_checkpoint,
    read_weights,
)
from rwkv_train.checkpoints.writing import write_weights

__all__ = [
    "Adapter",
    "AdapterNote",
    "Conversion",
    "Description",
    "ParameterState",
    "TrainingCheckpoint",
    "TrainingState",
    "Weights",
    "checkpoint_bytes",
    "convert",
    "decode_random_state",
    "describe_checkpoint",
    "encode_random_state",
    "fingerprint",
    "infer_config",
    "list_training_checkpoints",
    "load_model",
    "load_training_checkpoint",
    "locate_checkpoint",
    "merge",
    "merge_into",
    "newest_valid_checkpoint",
    "open_training_checkpoint",
    "prune_training_checkpoints",
    "read_adapter",
    "read_weights",
    "require_space",
    "save_training_checkpoint",
    "write_weights",
]
