"""Weights with what is known about them, read from any format."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.deepspeed_folder import read_deepspeed_folder
from rwkv_train.checkpoints.descriptions import (
    find_problem,
    parse_model,
    parse_tokenizer,
    read_json,
    verify_files,
)
from rwkv_train.checkpoints.formats import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SOURCE_FORMATS,
    WEIGHTS_FILE,
    Format,
    SourceFormat,
    recognize_format,
)
from rwkv_train.checkpoints.hub import resolve_path
from rwkv_train.checkpoints.hugging_face import read_hugging_face
from rwkv_train.checkpoints.infer import check_tensors, fill_unused, infer_config, make_explicit
from rwkv_train.checkpoints.lightning_ckpt import read_lightning_ckpt
from rwkv_train.checkpoints.manifest import STATE_FILE, WEIGHTS, own_shapes, tensor_files, verify_checkpoint
from rwkv_train.checkpoints.merging import merge_into
from rwkv_train.checkpoints.pth import read_pth
from rwkv_train.checkpoints.run_folder import newest_valid_checkpoint
from rwkv_train.checkpoints.tensor_files import TensorFiles, tensor_file_names
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import cast, dtype_name, require_dense, require_floats, strip_wrappers
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model
from rwkv_train.tokenizers import TokenizerIdentity

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
    tensors: Mapping[str, Tensor]
    """Official name -> tensor on the CPU; those of a file are read when asked for, in the order of the model, and
    unused ones that it lacks are zeros. May be mapped from the disk: copy before you change one."""
    tokenizer: TokenizerIdentity | None
    """The tokenizer it was trained with; ``None`` where the file does not tell."""
    step: int | None
    """Optimizer steps it was trained for; ``None`` where the file does not tell."""
    absent: frozenset[str] = frozenset()
    """Names of the unused tensors that the file lacks."""


class Location(NamedTuple):
    """Where a checkpoint lies."""

    path: Path
    """A file, or the folder of one checkpoint."""
    format: Format
    """Its kind; never ``Format.RUN``."""


def locate_checkpoint(path: str | Path, source_format: SourceFormat | None = None) -> Location:
    """Find what a user's path means: a run's ``out_dir`` becomes its newest undamaged training checkpoint.

    Args:
        path: a file, a folder, or ``hf:OWNER/NAME/FILE``.
        source_format: what it must be; ``None``: whatever its content says.

    Raises:
        CheckpointError: there is no checkpoint there, or one that we do not read, or of another format.
    """
    local = resolve_path(path)
    kind = recognize_format(local)
    if source_format is not None and kind not in SOURCE_FORMATS[source_format]:
        wanted = " or ".join(each.value for each in SOURCE_FORMATS[source_format])
        raise CheckpointError(f"{local} is not what was asked for: found {kind.value}, wanted {wanted}")
    if kind is not Format.RUN:
        return Location(local, kind)
    # The optimizer is not needed here, so it need not be whole.
    newest = newest_valid_checkpoint(local, with_optimizer=False)
    if newest is None:
        raise CheckpointError(f"{local} holds no training checkpoint yet")
    return Location(newest, Format.TRAINING_CHECKPOINT)


def read_weights(path: str | Path, source_format: SourceFormat | None = None) -> Weights:
    """Read weights in any format, checked against the model that they imply.

    Args:
        path: an official ``.pth``, a safetensors file or folder, a Hugging Face folder, a training checkpoint (its
            float32 weights), the ``out_dir`` of a run (its newest checkpoint), a checkpoint folder of DeepSpeed, a
            ``.ckpt`` of Lightning, or ``hf:OWNER/NAME/FILE``.
        source_format: what it must be; ``None``: whatever its content says.

    Raises:
        CheckpointError: it is missing, damaged or malicious, or no model of ours, or of another format.
    """
    location = locate_checkpoint(path, source_format)
    return _READERS[location.format](location.path)


def load_model(
    path: str | Path,
    *,
    wkv_backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> tuple[LanguageModel, Weights]:
    """Build the model that a checkpoint holds, in evaluation mode.

    Args:
        path: as in :func:`read_weights`.
        wkv_backend: backend of the recurrence.
        device: where the model goes.
        dtype: dtype of all its parameters; ``None``: that of the file.
        adapter: merged into the weights, as :func:`merge_into` does; ``None``: there is none.

    Returns:
        The model, and the weights as they were read, merged where there is an adapter.

    Raises:
        CheckpointError: as in :func:`read_weights` and :func:`merge_into`; or the file mixes dtypes and ``dtype`` is
            ``None``.
    """
    weights = read_weights(path)
    if adapter is not None:
        weights = merge_into(weights, adapter, dtype=dtype)
    dtypes = {header.dtype for header in TensorSource.of(weights.tensors).headers.values()}
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


def _read_pth_weights(path: Path) -> Weights:
    tensors = read_pth(path)
    require_dense(path, tensors)
    return _bare_weights(path, TensorSource.of(tensors))


def _read_safetensors_weights(path: Path) -> Weights:
    return _bare_weights(path, TensorFiles(path.parent, [path.name]))


def _bare_weights(path: Path, tensors: TensorSource) -> Weights:
    """Weights of a file that says nothing but names and shapes."""
    named = strip_wrappers(tensors)
    require_floats(path, named)
    config = infer_config(named.headers, source=str(path))
    return _of_model(config, named)


def _read_safetensors_folder(folder: Path) -> Weights:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}; give the path of its {WEIGHTS_FILE} to do without"
        )
    description = read_json(path)
    problem = find_problem(description, _CONFIG_KEYS)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: {problem}")
    names = tensor_file_names(WEIGHTS, description["files"])
    verify_files(path, description["files"], names)
    config = make_explicit(parse_model(path, description["model"]))
    weights = _checked_weights(folder / names[0], config, TensorFiles(folder, names))
    tokenizer = parse_tokenizer(path, description["tokenizer"])
    return weights._replace(tokenizer=tokenizer, step=description["step"])


def _read_training_checkpoint(folder: Path) -> Weights:
    path = folder / MANIFEST_FILE
    manifest = verify_checkpoint(folder, with_optimizer=False)
    config = make_explicit(parse_model(path, manifest["arch_config"]))
    if own_shapes(path, manifest) is not None:
        base = manifest["learned"]["base"].get("init_from", "BASE")
        raise CheckpointError(
            f"{folder} holds only what finetuning ({manifest['learned']['method']}) has added to {base}, and no model; "
            + (
                f"merge it: rwkv-train merge-adapter {base} {folder} OUT"
                if manifest["learned"]["method"] == "lora"
                else f"use {base} with --state {folder / STATE_FILE}"
            )
        )
    files = TensorFiles(folder, tensor_files(folder, manifest, WEIGHTS))
    weights = _checked_weights(folder / WEIGHTS_FILE, config, files)
    return weights._replace(tokenizer=parse_tokenizer(path, manifest["tokenizer"]), step=manifest["step"])


def _read_hugging_face_weights(folder: Path) -> Weights:
    model = read_hugging_face(folder)
    return _of_model(model.config, model.tensors)


def _checked_weights(path: Path, config: ModelConfig, tensors: TensorSource) -> Weights:
    require_floats(path, tensors)
    check_tensors(config, tensors.headers, source=str(path))
    return _of_model(config, tensors)


def _of_model(config: ModelConfig, tensors: TensorSource) -> Weights:
    """Tensors that were checked, in the order of their model, with zeros for unused ones that are absent."""
    whole = fill_unused(config, tensors)
    absent = frozenset(name for name in whole if name not in tensors)
    return Weights(config, whole, tokenizer=None, step=None, absent=absent)


def _read_foreign_weights(
    read: Callable[[Path], tuple[TensorSource, int | None]],
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
    Format.HUGGING_FACE_FOLDER: _read_hugging_face_weights,
    Format.LIGHTNING_CKPT: _read_foreign_weights(read_lightning_ckpt),
}
