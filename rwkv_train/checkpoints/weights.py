"""Weights with what is known about them, read from any format and written to two."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.deepspeed_folder import read_deepspeed_folder
from rwkv_train.checkpoints.descriptions import (
    find_problem,
    parse_model,
    parse_tokenizer,
    read_json,
    verify_files,
    write_json,
)
from rwkv_train.checkpoints.formats import (
    CONFIG_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Format,
    recognize_format,
)
from rwkv_train.checkpoints.hub import resolve_path
from rwkv_train.checkpoints.infer import check_tensors, fill_unused, infer_config, make_explicit
from rwkv_train.checkpoints.io import new_file, new_folder, resolve_target, sha256_of
from rwkv_train.checkpoints.lightning_ckpt import read_lightning_ckpt
from rwkv_train.checkpoints.manifest import WEIGHTS, tensor_files, verify_checkpoint
from rwkv_train.checkpoints.pth import read_pth, save_pth
from rwkv_train.checkpoints.run_folder import newest_valid_checkpoint
from rwkv_train.checkpoints.safetensors_file import read_safetensors, save_safetensors
from rwkv_train.checkpoints.tensor_files import TensorFiles
from rwkv_train.checkpoints.tensors import (
    DTYPES,
    cast,
    check_dense_floats,
    dtype_name,
    require_same_bits,
    size_in_bytes,
    strip_wrappers,
)
from rwkv_train.config.model import ModelConfig
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, unused_parameters
from rwkv_train.tokenizers import TokenizerIdentity

UnusedTensors = Literal["keep", "drop"]
"""Whether a written file has the tensors that the model does not use (RWKV-7: ``blocks.0.att.v0/v1/v2``)."""

_CONFIG_KEYS: dict[str, tuple[type, ...]] = {
    "model": (dict,),
    "tokenizer": (dict, type(None)),
    "step": (int, type(None)),
    "files": (dict,),
}


class Weights(NamedTuple):
    """A model's weights."""

    config: ModelConfig
    """Its sizes, LoRA ranks as numbers."""
    tensors: dict[str, Tensor]
    """Official name -> tensor, on the CPU. May be mapped from the disk: copy before you change one."""
    tokenizer: TokenizerIdentity | None
    """The tokenizer it was trained with; ``None`` where the file does not tell."""
    step: int | None
    """Optimizer steps it was trained for; ``None`` where the file does not tell."""


class Location(NamedTuple):
    """Where a checkpoint lies."""

    path: Path
    """A file, or the folder of one checkpoint."""
    format: Format
    """Its kind; never ``Format.RUN``."""


def locate_checkpoint(path: str | Path) -> Location:
    """Find what a user's path means: a run's ``out_dir`` becomes its newest undamaged training checkpoint.

    Args:
        path: a file, a folder, or ``hf:OWNER/NAME/FILE``.

    Raises:
        CheckpointError: there is no checkpoint there, or one that we do not read.
    """
    local = resolve_path(path)
    kind = recognize_format(local)
    if kind is not Format.RUN:
        return Location(local, kind)
    # The optimizer is not needed here, so it need not be whole.
    newest = newest_valid_checkpoint(local, with_optimizer=False)
    if newest is None:
        raise CheckpointError(f"{local} holds no training checkpoint yet")
    return Location(newest, Format.TRAINING_CHECKPOINT)


def read_weights(path: str | Path) -> Weights:
    """Read weights in any format, checked against the model that they imply.

    Unused tensors that the file lacks are zeros.

    Args:
        path: an official ``.pth``, a safetensors file or folder, a training checkpoint (its float32 weights),
            the ``out_dir`` of a run (its newest checkpoint), or ``hf:OWNER/NAME/FILE``.

    Raises:
        CheckpointError: it is missing, damaged or malicious, or no model of ours.
    """
    location = locate_checkpoint(path)
    return _READERS[location.format](location.path)


def write_pth(
    path: str | Path,
    weights: Weights,
    dtype: torch.dtype | None = None,
    *,
    v7_block0: UnusedTensors = "keep",
    overwrite: bool = False,
) -> Path:
    """Write an official ``.pth`` file, read it back and compare it, and only then give it its name.

    Args:
        path: the file.
        weights: what to write.
        dtype: round every weight to this dtype; ``None`` keeps each as it is.
        v7_block0: ``"drop"`` leaves the unused tensors out, as some published files and readers do.
        overwrite: replace a file that is there.

    Returns:
        The path of the file, symbolic links followed.

    Raises:
        CheckpointError: there is something at ``path``, it cannot be written, or a weight is too large for
            ``dtype``.
    """
    target = resolve_target(path)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; a .pth needs the name of a file")
    _refuse_existing(target, overwrite)
    tensors = _tensors_to_write(target, weights, dtype, v7_block0)
    with new_file(target, size_in_bytes(tensors)) as new:
        save_pth(new, tensors)
        require_same_bits(target, tensors, read_pth(new))
    return target


def write_safetensors(
    folder: str | Path,
    weights: Weights,
    dtype: torch.dtype | None = None,
    *,
    v7_block0: UnusedTensors = "keep",
    overwrite: bool = False,
) -> Path:
    """Write a folder of ``model.safetensors`` and ``config.json``, as :func:`write_pth` writes a file.

    Args:
        folder: the folder; only one that holds nothing but these two files is ever replaced.
        weights: what to write.
        dtype: as in :func:`write_pth`.
        v7_block0: as in :func:`write_pth`.
        overwrite: replace a folder that is there.

    Returns:
        The path of the folder, symbolic links followed.

    Raises:
        CheckpointError: as in :func:`write_pth`.
    """
    target = resolve_target(folder)
    _refuse_existing(target, overwrite)
    if target.exists() and not (target.is_dir() and _entries(target) <= {WEIGHTS_FILE, CONFIG_FILE}):
        raise CheckpointError(
            f"{target} is not replaced: it is no folder of just {WEIGHTS_FILE} and {CONFIG_FILE}; choose "
            "another name"
        )
    tensors = _tensors_to_write(target, weights, dtype, v7_block0)
    with new_folder(target, size_in_bytes(tensors)) as new:
        save_safetensors(new / WEIGHTS_FILE, tensors)
        require_same_bits(target, tensors, read_safetensors(new / WEIGHTS_FILE))
        description = {
            "format": FORMAT_VERSION,
            "model": to_tree(make_explicit(weights.config)),
            "tokenizer": None if weights.tokenizer is None else weights.tokenizer._asdict(),
            "step": weights.step,
            "files": {WEIGHTS_FILE: sha256_of(new / WEIGHTS_FILE)},
        }
        write_json(new / CONFIG_FILE, description)
    return target


def load_model(
    path: str | Path,
    *,
    wkv_backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[LanguageModel, Weights]:
    """Build the model that a checkpoint holds, in evaluation mode.

    Args:
        path: as in :func:`read_weights`.
        wkv_backend: backend of the recurrence.
        device: where the model goes.
        dtype: dtype of all its parameters; ``None``: that of the file.

    Returns:
        The model, and the weights as they were read.

    Raises:
        CheckpointError: as in :func:`read_weights`; or the file mixes dtypes and ``dtype`` is ``None``.
    """
    weights = read_weights(path)
    dtypes = {tensor.dtype for tensor in weights.tensors.values()}
    if dtype is None and len(dtypes) > 1:
        found = ", ".join(sorted(dtype_name(found) for found in dtypes))
        raise CheckpointError(f"{path} mixes dtypes ({found}), in which a model cannot run; choose one")
    model = build_model(weights.config, wkv_backend=wkv_backend, device="meta")
    # Copies: memory of the usual alignment, which stays if the file is overwritten.
    copies = {
        name: cast(path, name, tensor, dtype).to(device, copy=True)
        for name, tensor in weights.tensors.items()
    }
    model.load_state_dict(copies, assign=True)
    return model.eval(), weights


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} is already there; choose another name or ask for it to be overwritten"
        )


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _tensors_to_write(
    target: Path, weights: Weights, dtype: torch.dtype | None, v7_block0: UnusedTensors
) -> dict[str, Tensor]:
    """All tensors of the model in its own order and the wanted dtype, with or without the unused ones."""
    if dtype not in {None, *DTYPES.values()}:
        raise ValueError(f"dtype ({dtype}) must be one of {', '.join(map(str, DTYPES.values()))}")
    check_tensors(weights.config, weights.tensors)
    dropped = unused_parameters(weights.config.arch) if v7_block0 == "drop" else frozenset()
    return {
        name: cast(target, name, tensor, dtype)
        for name, tensor in fill_unused(weights.config, weights.tensors).items()
        if name not in dropped
    }


def _read_pth_weights(path: Path) -> Weights:
    return _bare_weights(path, read_pth(path))


def _read_safetensors_weights(path: Path) -> Weights:
    return _bare_weights(path, read_safetensors(path))


def _bare_weights(path: Path, tensors: Mapping[str, Tensor]) -> Weights:
    """Weights of a file that says nothing but names and shapes."""
    check_dense_floats(path, tensors)
    named = strip_wrappers(tensors)
    config = infer_config(named, source=str(path))
    return Weights(config, fill_unused(config, named), tokenizer=None, step=None)


def _read_safetensors_folder(folder: Path) -> Weights:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}; give the path of its {WEIGHTS_FILE} to do without"
        )
    description = read_json(path)
    if "model_type" in description and "format" not in description:
        kind = description["model_type"]
        raise CheckpointError(f"{folder} is a Hugging Face model of type {kind!r}, which is not supported")
    problem = find_problem(description, _CONFIG_KEYS)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: {problem}")
    verify_files(path, description["files"], [WEIGHTS_FILE])
    config = make_explicit(parse_model(path, description["model"]))
    tensors = _checked_tensors(folder / WEIGHTS_FILE, config, read_safetensors(folder / WEIGHTS_FILE))
    return Weights(config, tensors, parse_tokenizer(path, description["tokenizer"]), description["step"])


def _read_training_checkpoint(folder: Path) -> Weights:
    path = folder / MANIFEST_FILE
    manifest = verify_checkpoint(folder, with_optimizer=False)
    config = make_explicit(parse_model(path, manifest["arch_config"]))
    files = TensorFiles(folder, tensor_files(folder, manifest, WEIGHTS))
    tensors = _checked_tensors(
        folder / WEIGHTS_FILE, config, {name: files.read(name) for name in files.headers}
    )
    return Weights(config, tensors, parse_tokenizer(path, manifest["tokenizer"]), manifest["step"])


def _checked_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_dense_floats(path, tensors)
    check_tensors(config, tensors, source=str(path))
    return fill_unused(config, tensors)


def _read_foreign_weights(
    read: Callable[[Path], tuple[dict[str, Tensor], int | None]],
) -> Callable[[Path], Weights]:
    """Weights with a step, of a program that knows nothing of our settings."""

    def read_weights_of(path: Path) -> Weights:
        tensors, step = read(path)
        return _bare_weights(path, tensors)._replace(step=step)

    return read_weights_of


_READERS: Mapping[Format, Callable[[Path], Weights]] = {
    Format.PTH: _read_pth_weights,
    Format.LEGACY_PTH: _read_pth_weights,
    Format.SAFETENSORS_FILE: _read_safetensors_weights,
    Format.SAFETENSORS_FOLDER: _read_safetensors_folder,
    Format.TRAINING_CHECKPOINT: _read_training_checkpoint,
    Format.DEEPSPEED_FOLDER: _read_foreign_weights(read_deepspeed_folder),
    Format.LIGHTNING_CKPT: _read_foreign_weights(read_lightning_ckpt),
}
