"""Weights with an adapter merged into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_train.checkpoints.adapter_note import ADAPTER_NOTE, AdapterNote
from rwkv_train.checkpoints.adapters import Adapter, read_adapter
from rwkv_train.checkpoints.fingerprint import SHORT, fingerprint
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import cast
from rwkv_train.config.load import NOT_IN_WEIGHTS
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError

if TYPE_CHECKING:
    from rwkv_train.checkpoints.weights import Weights


def merge(weights: Mapping[str, Tensor], adapter: Adapter, dtype: torch.dtype | None = None) -> TensorSource:
    """Return weights that give alone what ``weights`` give with the adapter.

    Each is computed in float64 when it is read, and rounded once.

    Args:
        weights: official name -> tensor on the CPU, those of the adapter's base.
        adapter: what is merged.
        dtype: dtype of the merged matrices; ``None``: that of the base's. All other weights stay as they are.

    Raises:
        CheckpointError: a layer of the adapter is not in the base, or has another size. When a tensor is read: it
            does not fit into the dtype, or a row of it has no direction that DoRA could give a length.
    """
    base = TensorSource.of(weights)
    headers = dict(base.headers)
    names = {f"{layer}.weight": layer for layer in adapter.layers}
    for name, layer in names.items():
        if name not in headers:
            raise CheckpointError(f"{adapter.path}: the base has no layer '{layer}'")
        shape = headers[name].shape
        if not adapter.layers[layer].fits(shape):
            raise CheckpointError(
                f"{adapter.path}: the adapter of '{layer}' is for a layer of another size than the base's, "
                f"{list(shape)}"
            )
        headers[name] = torch.empty(shape, dtype=dtype or headers[name].dtype, device="meta")

    def read(name: str) -> Tensor:
        if name not in names:
            return base[name]
        merged = adapter.layers[names[name]].applied_to(base[name])
        if not bool(merged.isfinite().all()):
            raise CheckpointError(
                f"{adapter.path}: merged, tensor '{name}' holds values that are not finite; a row of the base's is "
                "zero or the adapter is damaged"
            )
        return cast(adapter.path, name, merged, headers[name].dtype)

    return TensorSource(headers, read)


def merge_into(
    weights: "Weights",
    adapter: str | Path,
    *,
    dtype: torch.dtype | None = None,
    unchecked_base: bool = False,
) -> "Weights":
    """Read an adapter, make sure that the weights are its base, and merge it.

    Args:
        weights: the base.
        adapter: as in :func:`read_adapter`.
        dtype: as in :func:`merge`.
        unchecked_base: also take an adapter that does not say what its base is.

    Returns:
        The merged weights, with the adapter's tokenizer where it names one. Steps of training are those of neither.

    Raises:
        CheckpointError: as in :func:`read_adapter` and :func:`merge`; or the adapter is of another base, or does not
            say of which.
    """
    found = read_adapter(adapter)
    if found.note is not None:
        require_base(found.path, found.note, weights.config, weights.tensors)
    elif not unchecked_base:
        raise CheckpointError(
            f"{found.path} has no {ADAPTER_NOTE}, so nothing says of which base it is; merge-adapter takes it with "
            "--unchecked-base"
        )
    tokenizer = weights.tokenizer if found.note is None else found.note.tokenizer or weights.tokenizer
    return weights._replace(tensors=merge(weights.tensors, found, dtype), tokenizer=tokenizer, step=None)


def require_base(path: Path, note: AdapterNote, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those an adapter was trained on.

    Args:
        path: the adapter, for messages.
        note: what it says of its base.
        config: the sizes of the weights.
        weights: name -> tensor.

    Raises:
        CheckpointError: the architecture, a size or the numbers differ.
    """
    wanted, found = ({"arch": each.arch, **dict(make_explicit(each))} for each in (note.model, config))
    for name, value in wanted.items():
        # Ranks of unused tensors need not be those of the file; all others show in the fingerprint.
        if name not in {*NOT_IN_WEIGHTS, "lora_ranks"} and found.get(name) != value:
            raise CheckpointError(
                f"{path} is for a base whose {name} is {value}; this one's is {found.get(name)}"
            )
    if (is_of := fingerprint(weights)) != note.base:
        raise CheckpointError(
            f"{path} is for another base: it was trained on weights with the fingerprint {note.base[:SHORT]}, these "
            f"have {is_of[:SHORT]}"
        )
