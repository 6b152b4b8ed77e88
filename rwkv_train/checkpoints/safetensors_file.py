"""Tensors in one ``.safetensors`` file: a JSON table of names, dtypes, shapes and places, then the values.

The format cannot hold a program. It has no checksum either: a flipped bit in a value shows only where a
SHA-256 was written beside the file, as our folders and training checkpoints do.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from rwkv_train.checkpoints.tensors import with_own_memory
from rwkv_train.errors import CheckpointError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Returns:
        Tensors on the CPU, mapped from the disk: copy before you change them.

    Raises:
        CheckpointError: the file is damaged or not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    except Exception as error:  # bytes that someone made up can raise anything
        raise CheckpointError(f"{path} is truncated or damaged: {' '.join(str(error).split())}") from error


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to ``path``; use :func:`new_file` or :func:`new_folder` to do it safely.

    Raises:
        CheckpointError: the file could not be written.
    """
    content = with_own_memory(tensors)
    try:
        # "format" is what other readers of such files ask for.
        save_file(content, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # also where the disk is full
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path.parent}: {path.name} cannot be written: {reason}") from error
