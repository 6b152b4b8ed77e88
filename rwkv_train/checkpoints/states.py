"""Files of a state that texts start from: ours, and the official one of state tuning.

The official file is a dictionary of ``blocks.N.att.time_state`` ``[H, N, N]``, for RWKV-5, 6 and 7 alike indexed
``[value, key]`` in a head, which is our order. It has no last inputs of the token shifts: these are zero. RWKV-4 has no
such file.

Source:
    RWKV-LM, ``RWKV-v5/src/model.py``, ``train_type`` "states", whose kernel reads a row for each value; the package
    ``rwkv`` transposes what it reads to its own ``[key, value]`` for RWKV-5 and 6, and has ``[value, key]`` for RWKV-7.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.formats import CHECKPOINTS_FOLDER
from rwkv_train.checkpoints.io import new_file
from rwkv_train.checkpoints.manifest import STATE_FILE
from rwkv_train.checkpoints.pth import LEGACY_MAGIC, ZIP_MAGIC, read_pth, save_pth
from rwkv_train.checkpoints.run_folder import newest_valid_checkpoint
from rwkv_train.checkpoints.tensor_files import TensorFiles
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import build_model
from rwkv_train.models.state import LayerState, ModelState, base_of_state, load_state

OFFICIAL_SUFFIX = ".att.time_state"


def read_state_file(path: str | Path, config: ModelConfig, *, base: str | None = None) -> ModelState:
    """Read the state of one text from a file of :func:`~rwkv_train.models.state.save_state`, or an official one.

    Args:
        path: our safetensors file, or a ``.pth`` or safetensors file of official names; the content tells which. Or the
            folder of a training checkpoint that has one, or of a run, whose newest checkpoint counts.
        config: settings of the model that it is for.
        base: fingerprint of that model's weights; a file that names others is refused.

    Returns:
        The state, ``[1, ...]`` on the CPU, in the dtypes of the file.

    Raises:
        CheckpointError: the file is missing or damaged, holds something else or numbers that are not finite, or is
            of another model.
    """
    path = _find_file(Path(path).expanduser())
    tensors = read_pth(path) if _is_pickle(path) else TensorFiles(path.parent, [path.name])
    empty = build_model(config, device="meta").zero_state(1)
    if any(name.endswith(OFFICIAL_SUFFIX) for name in tensors) or _is_pickle(path):
        state = _from_official(path, tensors, config, empty)
    else:
        state = load_state(path)
        _require_base(path, base)
    require_state_of(path, state, empty)
    for layer, layer_state in enumerate(state):
        for field, tensor in layer_state._asdict().items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{path}: {field} of layer {layer} is not made of finite numbers")
    return state


def require_state_of(path: str | Path, state: ModelState, like: ModelState) -> None:
    """Refuse a state of other sizes.

    Args:
        path: where it is from.
        state: what was read.
        like: a state of the model that it is for.

    Raises:
        CheckpointError: with the sizes of both.
    """
    if [[x.shape for x in layer] for layer in state] != [[x.shape for x in layer] for layer in like]:
        raise CheckpointError(
            f"{path} is the state of another model: it has {_describe(state)}; this model's has {_describe(like)}"
        )


def why_not_official(state: ModelState) -> str | None:
    """Return why the official file has no place for a state, or ``None`` if it has one."""
    n_texts = state[0].wkv.shape[0]
    if state[0].wkv.ndim != 4:
        return "RWKV-4 has no official file of a state"
    if n_texts != 1:
        return f"the state is of {n_texts} texts, and an official file holds that of one"
    if any(bool(x.any()) for layer in state for x in (layer.time_mix_x, layer.channel_mix_x)):
        return (
            "the state holds last inputs of the token shifts, as after a text or a prefix, and the official file has "
            "no place for them"
        )
    return None


def save_official_state(path: str | Path, state: ModelState) -> None:
    """Write the state of one text as official state tuning does, in float32; the file appears whole or not at all.

    Args:
        path: the ``.pth`` file.
        state: ``[1, ...]``, of RWKV-5, 6 or 7, with zeros for the last inputs of the token shifts.

    Raises:
        CheckpointError: the official file has no place for it (:func:`why_not_official`), or cannot be written.
    """
    problem = why_not_official(state)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be written: {problem}")
    tensors = {
        f"blocks.{layer}{OFFICIAL_SUFFIX}": layer_state.wkv[0].detach().to("cpu", torch.float32).contiguous()
        for layer, layer_state in enumerate(state)
    }
    with new_file(Path(path), sum(tensor.nbytes for tensor in tensors.values())) as unfinished:
        save_pth(unfinished, tensors)


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    folder = path
    if (path / CHECKPOINTS_FOLDER).is_dir():
        newest = newest_valid_checkpoint(path, with_optimizer=False)
        if newest is None:
            raise CheckpointError(f"{path} holds no training checkpoint yet")
        folder = newest
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no {STATE_FILE}; wanted the file of a state, or a run that learns one"
        )
    return folder / STATE_FILE


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(max(len(ZIP_MAGIC), len(LEGACY_MAGIC)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return start.startswith((ZIP_MAGIC, LEGACY_MAGIC))


def _from_official(
    path: Path, tensors: Mapping[str, Tensor], config: ModelConfig, empty: ModelState
) -> ModelState:
    names = [f"blocks.{layer}{OFFICIAL_SUFFIX}" for layer in range(len(empty))]
    others = sorted(set(tensors) - set(names))
    missing = [name for name in names if name not in tensors]
    if not any(name.endswith(OFFICIAL_SUFFIX) for name in tensors):
        found = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: not the state of a model: found {found}; a state has {names[0]} and so on"
        )
    if empty[0].wkv.ndim != 4:
        raise CheckpointError(
            f"{path} is an official state, which {config.arch} has not; wanted a state of an {config.arch}"
        )
    if missing or others:
        problem = f"it has {others[0]}" if others else f"it lacks {missing[0]}"
        raise CheckpointError(
            f"{path} is the state of another model: {problem}; this model's has {names[0]} to {names[-1]}"
        )
    return tuple(
        LayerState(
            time_mix_x=torch.zeros(layer.time_mix_x.shape, dtype=torch.float32),
            wkv=tensors[name].unsqueeze(0),
            channel_mix_x=torch.zeros(layer.channel_mix_x.shape, dtype=torch.float32),
        )
        for name, layer in zip(names, empty, strict=True)
    )


def _require_base(path: Path, base: str | None) -> None:
    found = base_of_state(path)
    if None not in (found, base) and found != base:
        raise CheckpointError(
            f"{path} belongs to other weights than these: their fingerprint is {found}, and this model's {base}"
        )


def _describe(state: ModelState) -> str:
    shapes = ", ".join(str(list(tensor.shape)) for tensor in state[0])
    return f"{len(state)} layers of {shapes}"
