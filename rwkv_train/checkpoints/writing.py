"""Weights written in another format: one tensor at a time, read back, and named only when they are right."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rwkv_train.checkpoints.descriptions import write_json
from rwkv_train.checkpoints.formats import CONFIG_FILE, FORMAT_VERSION
from rwkv_train.checkpoints.infer import check_tensors, make_explicit
from rwkv_train.checkpoints.io import new_file, new_folder, require_space, resolve_target, sha256_of
from rwkv_train.checkpoints.manifest import WEIGHTS
from rwkv_train.checkpoints.pth import read_pth, save_pth
from rwkv_train.checkpoints.tensor_files import TensorFiles, is_tensor_file, write_tensor_files
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import DTYPES, cast_all, require_same_bits
from rwkv_train.checkpoints.weights import Weights
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import unused_parameters

TargetFormat = Literal["pth", "safetensors"]
"""``"pth"``: an official file. ``"safetensors"``: a folder of weights and their description."""

UnusedTensors = Literal["keep", "drop", "fill"]
"""Which of the tensors that the model does not use (RWKV-7: ``blocks.0.att.v0/v1/v2``) are written: those that the
source has, none, or all of them, zeros where the source lacks them."""


class _Writer(NamedTuple):
    """How weights are written in one format."""

    is_folder: bool
    write: Callable[[Path, Weights, TensorSource], TensorSource]
    """Writes tensors to a path and returns what it finds there then."""
    owns: Callable[[str], bool] = lambda name: False
    """Tells whether a folder may hold a file of that name and still be replaced."""


class Plan(NamedTuple):
    """What is to be written, and where; nothing has changed yet."""

    target: Path
    """The file or folder, symbolic links followed."""
    to: TargetFormat
    weights: Weights
    tensors: TensorSource
    """The tensors under the names, and in the order and dtype, that the target is to have."""


def plan_writing(
    path: str | Path,
    weights: Weights,
    to: TargetFormat,
    dtype: torch.dtype | None = None,
    *,
    v7_block0: UnusedTensors = "keep",
    overwrite: bool = False,
) -> Plan:
    """Check that weights can be written as asked.

    Args:
        path: a file for ``"pth"``, a folder for ``"safetensors"``.
        weights: what to write.
        to: the format.
        dtype: round every weight to this dtype; ``None`` keeps each as it is.
        v7_block0: which of RWKV-7's unused tensors are in it; some published files and readers have none.
        overwrite: replace what is there; of folders only those that hold nothing but files of the format.

    Raises:
        CheckpointError: there is something at ``path``, the disk is too full, or tensors do not fit
            ``weights.config``.
        ValueError: the dtype is none that weights are stored in.
    """
    if dtype not in {None, *DTYPES.values()}:
        raise ValueError(f"dtype ({dtype}) must be one of {', '.join(map(str, DTYPES.values()))}")
    target = resolve_target(path)
    _refuse_existing(target, to, overwrite)
    tensors = TensorSource.of(weights.tensors)
    check_tensors(weights.config, tensors.headers)
    unused = unused_parameters(weights.config.arch)
    dropped = {"keep": weights.absent, "drop": unused, "fill": frozenset[str]()}[v7_block0]
    kept = tensors.renamed({name: name for name in tensors if name not in dropped})
    wanted = cast_all(target, kept, dtype)
    require_space(target, wanted.n_bytes)
    return Plan(target, to, weights, wanted)


def carry_out(plan: Plan) -> Path:
    """Write what was planned, read it back and compare every bit, and only then give it its name.

    Returns:
        ``plan.target``.

    Raises:
        CheckpointError: it cannot be written, a weight is too large for its dtype, or the disk is at fault; what was
            at the target is still there.
    """
    writer = _WRITERS[plan.to]
    make = new_folder if writer.is_folder else new_file
    with make(plan.target, plan.tensors.n_bytes) as new:
        require_same_bits(plan.target, plan.tensors, writer.write(new, plan.weights, plan.tensors))
    return plan.target


def write_weights(
    path: str | Path,
    weights: Weights,
    to: TargetFormat,
    dtype: torch.dtype | None = None,
    *,
    v7_block0: UnusedTensors = "keep",
    overwrite: bool = False,
) -> Path:
    """Plan and carry out: see :func:`plan_writing` and :func:`carry_out`."""
    return carry_out(plan_writing(path, weights, to, dtype, v7_block0=v7_block0, overwrite=overwrite))


def _refuse_existing(target: Path, to: TargetFormat, overwrite: bool) -> None:
    writer = _WRITERS[to]
    if target.is_dir() and not writer.is_folder:
        raise CheckpointError(f"{target} is a folder; {to} needs the name of a file")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} is already there; choose another name, or replace it with --overwrite"
        )
    if writer.is_folder and not (
        target.is_dir() and all(writer.owns(file.name) for file in target.iterdir())
    ):
        raise CheckpointError(
            f"{target} is not replaced: it is no folder of just a model's files; choose another name"
        )


def _write_pth(path: Path, weights: Weights, tensors: TensorSource) -> TensorSource:
    save_pth(path, tensors)
    return TensorSource.of(read_pth(path))


def _write_safetensors(folder: Path, weights: Weights, tensors: TensorSource) -> TensorSource:
    names = write_tensor_files(folder, WEIGHTS, tensors)
    description = {
        "format": FORMAT_VERSION,
        "model": to_tree(make_explicit(weights.config)),
        "tokenizer": None if weights.tokenizer is None else weights.tokenizer._asdict(),
        "step": weights.step,
        "files": {name: sha256_of(folder / name) for name in names},
    }
    write_json(folder / CONFIG_FILE, description)
    return TensorFiles(folder, names)


_WRITERS: Mapping[TargetFormat, _Writer] = {
    "pth": _Writer(is_folder=False, write=_write_pth),
    "safetensors": _Writer(
        is_folder=True,
        write=_write_safetensors,
        owns=lambda name: name == CONFIG_FILE or is_tensor_file(WEIGHTS, name),
    ),
}
