"""What is in a checkpoint, in numbers that people ask for."""

from pathlib import Path
from typing import NamedTuple

from rwkv_train.checkpoints.formats import Format
from rwkv_train.checkpoints.manifest import read_manifest
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import dtype_name
from rwkv_train.checkpoints.weights import locate_checkpoint, read_weights

_TELLS_CTX_LEN = {Format.SAFETENSORS_FOLDER, Format.TRAINING_CHECKPOINT}


class Description(NamedTuple):
    """Facts about a checkpoint; ``None`` where there is no such thing or the file does not tell."""

    path: str
    """The file or folder that was read."""
    format: str
    """What it is, in words."""
    arch: str
    """``"rwkv4"`` to ``"rwkv7"``."""
    version: str
    """``"4"``, ``"5.0"``, ``"5.1"``, ``"5.2"``, ``"6"``, ``"7"``."""
    n_layer: int
    n_embd: int
    n_head: int | None
    head_size: int | None
    lora_ranks: dict[str, int] | None
    """RWKV-6's ranks shift and decay, RWKV-7's ranks w, a, v, g."""
    ffn_width: int
    """Hidden width of the channel mix."""
    vocab_size: int
    ctx_len: int | None
    """Length of a training sample in tokens."""
    parameters: int
    """Number of weights, unused ones included."""
    dtypes: dict[str, int]
    """``"fp32"``, ``"bf16"``, ``"fp16"`` -> number of weights."""
    tokenizer: dict[str, str] | None
    """``name`` and ``sha256``."""
    step: int | None
    """Optimizer steps."""
    tokens: int | None
    """Tokens trained on."""


def describe_checkpoint(path: str | Path) -> Description:
    """Read a checkpoint and describe it.

    Args:
        path: as in :func:`read_weights`.

    Raises:
        CheckpointError: it cannot be read.
    """
    location = locate_checkpoint(path)
    weights = read_weights(location.path)
    config = weights.config
    dtypes: dict[str, int] = {}
    for header in TensorSource.of(weights.tensors).headers.values():
        dtypes[dtype_name(header.dtype)] = dtypes.get(dtype_name(header.dtype), 0) + header.numel()
    is_training = location.format is Format.TRAINING_CHECKPOINT
    return Description(
        path=str(location.path),
        format=location.format.value,
        arch=config.arch,
        version=config.version,
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        head_size=config.head_size,
        lora_ranks=config.low_ranks or None,
        ffn_width=config.ffn_width,
        vocab_size=config.vocab_size,
        ctx_len=config.ctx_len if location.format in _TELLS_CTX_LEN else None,
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        tokenizer=weights.tokenizer._asdict() if weights.tokenizer else None,
        step=weights.step,
        tokens=read_manifest(location.path)["tokens"] if is_training else None,
    )
