"""The recurrent memory of a model: what it must keep of all tokens it has read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_train.errors import CheckpointError


class LayerState(NamedTuple):
    """Memory of one block. A tuple, not a dataclass, because DeepSpeed's hooks walk tuples only."""

    time_mix_x: Tensor
    """Last input of the time mix, ``[B, C]``, in the dtype of the activations."""
    wkv: Tensor
    """State of the recurrence in float32: RWKV-4 ``[B, 3, C]``, others ``[B, H, N, N]`` (value, key)."""
    channel_mix_x: Tensor
    """Last input of the channel mix, ``[B, C]``, in the dtype of the activations."""


ModelState = tuple[LayerState, ...]
"""Memory of a model, one entry for each block."""

BASE = "base"
"""Name of a file's entry with the fingerprint of the weights that a state belongs to."""


def join_rows(states: Sequence[ModelState]) -> ModelState:
    """Return the state of a batch that has the rows of all of these, one after another; in the first one's dtypes."""
    # The dtype of a carried state is the activations', under autocast perhaps not the weights'.
    return tuple(
        LayerState(*(torch.cat([x.to(parts[0].dtype) for x in parts]) for parts in zip(*layers, strict=True)))
        for layers in zip(*states, strict=True)
    )


def take_rows(state: ModelState, rows: Sequence[int]) -> ModelState:
    """Return the state of a batch of these rows, in this order; a row may come several times."""

    def take(x: Tensor) -> Tensor:
        return x[torch.tensor(rows, dtype=torch.int64, device=x.device)]

    return tuple(LayerState(*map(take, layer)) for layer in state)


def save_state(path: str | Path, state: ModelState, *, base: str | None = None) -> None:
    """Write ``state`` as safetensors, tensors named ``LAYER.FIELD``; the file appears whole or not at all.

    Args:
        path: the file.
        state: of any batch size.
        base: fingerprint of the weights that it belongs to, for who reads it; see :func:`base_of_state`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    tensors = {
        f"{layer}.{field}": tensor.detach().contiguous()
        for layer, layer_state in enumerate(state)
        for field, tensor in layer_state._asdict().items()
    }
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        save_file(tensors, unfinished, None if base is None else {BASE: base})
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: the state cannot be written: {error}") from error


def load_state(path: str | Path) -> ModelState:
    """Read a state that :func:`save_state` wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else than a state.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the state cannot be read: {error}") from error
    names = [
        [f"{layer}.{field}" for field in LayerState._fields]
        for layer in range(len(tensors) // len(LayerState._fields))
    ]
    if not tensors or set(tensors) != {name for layer in names for name in layer}:
        raise CheckpointError(
            f"{path}: not the state of a model: found {', '.join(sorted(tensors)[:3]) or 'no tensors'}; "
            f"a state has {', '.join(f'0.{field}' for field in LayerState._fields)}, 1. and so on"
        )
    return tuple(LayerState(*(tensors[name] for name in layer)) for layer in names)


def base_of_state(path: str | Path) -> str | None:
    """Return the fingerprint that :func:`save_state` was given; ``None`` where it was given none.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(BASE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the state cannot be read: {error}") from error
