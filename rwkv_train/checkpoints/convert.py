"""From any format of weights to one of two."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rwkv_train.checkpoints.weights import UnusedTensors, read_weights, write_pth, write_safetensors
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import unused_parameters

TargetFormat = Literal["pth", "safetensors"]
"""``"pth"``: an official file. ``"safetensors"``: a folder of weights and their description."""

_WRITERS = {"pth": write_pth, "safetensors": write_safetensors}


class Conversion(NamedTuple):
    """What was written."""

    path: Path
    """The file or folder."""
    n_tensors: int
    """Number of tensors in it."""
    size_bytes: int
    """Size of the file, or of all files of the folder."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: TargetFormat,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    v7_block0: UnusedTensors = "keep",
) -> Conversion:
    """Write the weights of ``src`` to ``dst``, read them back and compare every bit.

    Args:
        src: as in :func:`read_weights`.
        dst: a file for ``"pth"``, a folder for ``"safetensors"``.
        to: the format to write.
        dtype: round every weight to this dtype; ``None`` keeps each as it is.
        overwrite: replace what is at ``dst``, once the new one is complete.
        v7_block0: whether RWKV-7's unused ``blocks.0.att.v0/v1/v2`` are in what is written; kept ones that
            ``src`` lacks are zeros.

    Raises:
        CheckpointError: ``src`` cannot be read or ``dst`` not written; what was at ``dst`` is still there.
        ValueError: there is no format ``to``.
    """
    if to not in _WRITERS:
        raise ValueError(f"to ({to!r}) must be one of {', '.join(_WRITERS)}")
    # Before the reading, which may take minutes; the writers look again.
    if (Path(dst).exists() or Path(dst).is_symlink()) and not overwrite:
        raise CheckpointError(f"{dst} is already there; choose another name, or replace it with --overwrite")
    weights = read_weights(src)
    path = _WRITERS[to](dst, weights, dtype, v7_block0=v7_block0, overwrite=overwrite)
    n_dropped = len(unused_parameters(weights.config.arch)) if v7_block0 == "drop" else 0
    files = path.iterdir() if path.is_dir() else [path]
    return Conversion(path, len(weights.tensors) - n_dropped, sum(file.stat().st_size for file in files))
