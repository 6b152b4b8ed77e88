"""From any format of weights to one of those that are written."""

from pathlib import Path
from typing import NamedTuple, get_args

import torch

from rwkv_train.checkpoints.formats import SourceFormat
from rwkv_train.checkpoints.merging import merge_into
from rwkv_train.checkpoints.weights import read_weights
from rwkv_train.checkpoints.writing import (
    StoredDtype,
    TargetFormat,
    UnusedTensors,
    already_there,
    carry_out,
    plan_writing,
)


class Conversion(NamedTuple):
    """What was written, or would be."""

    path: Path
    """The file or folder."""
    to: TargetFormat
    """Its format."""
    arch: str
    """``"rwkv4"`` to ``"rwkv7"``."""
    n_tensors: int
    """Number of tensors in it."""
    size_bytes: int
    """Size of the file, or of all files of the folder; of the tensors alone where nothing was written."""
    is_written: bool
    """False after a dry run."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: TargetFormat,
    *,
    source_format: SourceFormat | None = None,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
    v7_block0: UnusedTensors = "keep",
    dry_run: bool = False,
    adapter: str | Path | None = None,
    unchecked_base: bool = False,
) -> Conversion:
    """Write the weights of ``src`` to ``dst``, read them back and compare every bit.

    One tensor at a time is read and written, so a model need not fit into memory.

    Args:
        src: as in :func:`read_weights`.
        dst: a file or folder, as the format is.
        to: the format to write.
        source_format: what ``src`` must be; ``None``: whatever its content says.
        dtype: round every weight to this dtype; ``None`` keeps each as it is.
        overwrite: replace what is at ``dst``, once the new one is complete.
        v7_block0: which of RWKV-7's unused ``blocks.0.att.v0/v1/v2`` are in what is written.
        dry_run: check all that can be checked without writing.
        adapter: merge it into the weights, as :func:`merge_into` does; ``None``: there is none.
        unchecked_base: also take an adapter that does not say what its base is.

    Raises:
        CheckpointError: ``src`` cannot be read, or the adapter is not for it, or ``dst`` cannot be written; what was at
            ``dst`` is still there.
        ValueError: there is no such format or choice.
    """
    for name, given, known in (
        ("to", to, get_args(TargetFormat)),
        ("source_format", source_format, (None, *get_args(SourceFormat))),
        ("v7_block0", v7_block0, get_args(UnusedTensors)),
    ):
        if given not in known:
            raise ValueError(f"{name} ({given!r}) must be one of {', '.join(map(str, known))}")
    # Before the reading, which may take minutes; the plan looks again.
    if (Path(dst).exists() or Path(dst).is_symlink()) and not overwrite:
        raise already_there(dst)
    weights = read_weights(src, source_format)
    if adapter is not None:
        # In the dtype that is asked for, not rounded to the base's on the way.
        rounded_to = torch.float32 if dtype == "q8_0" else dtype
        weights = merge_into(weights, adapter, dtype=rounded_to, unchecked_base=unchecked_base)
    plan = plan_writing(dst, weights, to, dtype, v7_block0=v7_block0, overwrite=overwrite)
    facts = plan.target, to, weights.config.arch, plan.n_tensors
    if dry_run:
        return Conversion(*facts, plan.n_bytes, is_written=False)
    path = carry_out(plan)
    files = path.iterdir() if path.is_dir() else [path]
    return Conversion(*facts, sum(file.stat().st_size for file in files), is_written=True)
