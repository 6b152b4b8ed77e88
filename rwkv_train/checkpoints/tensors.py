"""Rules for a dictionary of weights (name -> tensor) that every file format shares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights may be stored in, by the names that users write."""

_SAME_WIDTH_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of one weight -> the integer type with which its bits can be compared."""

_WRAPPER_PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, Lightning, torch.compile and training modules put before every name."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name users write for a dtype: ``torch.bfloat16`` -> ``"bf16"``."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def require_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are sparse, quantized or without values, or that repeat a few: small files without end.

    Raises:
        CheckpointError: it names the file, the tensor and what it is.
    """
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: tensor '{name}' is {tensor.dtype}, {tensor.layout}, on {tensor.device}; weights "
                "must be dense, in float32, bfloat16 or float16"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: tensor '{name}' {list(tensor.shape)} has fewer values than its shape (they stand for several "
                "each); store a contiguous copy"
            )


def require_floats(path: Path, tensors: TensorSource) -> None:
    """Refuse anything but float32, bfloat16 and float16.

    Raises:
        CheckpointError: it names the file, the tensor and what it is.
    """
    for name, header in tensors.headers.items():
        if header.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: tensor '{name}' is {header.dtype}; weights must be in float32, bfloat16 or float16"
            )


def strip_wrappers(tensors: TensorSource) -> TensorSource:
    """Return the tensors without the prefixes that wrappers put before every name.

    Example:
        >>> list(strip_wrappers(TensorSource.of({"module.model.emb.weight": torch.zeros(1)})))
        ['emb.weight']
    """
    names = {name: name for name in tensors}
    while names:
        prefix = next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        names = {name.removeprefix(prefix): original for name, original in names.items()}
    return tensors.renamed(names)


def cast(source: object, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a weight in ``dtype``, rounded to the nearest; ``None`` keeps it as it is.

    Args:
        source: where it comes from, for the message.
        name: its name.
        tensor: its values.
        dtype: the wanted dtype.

    Raises:
        CheckpointError: a finite weight would become infinite (above 65504 in float16).
    """
    if dtype is None or dtype == tensor.dtype:
        return tensor
    converted = tensor.to(dtype)
    limit = torch.finfo(dtype).max
    lowest, highest = torch.aminmax(tensor)
    if -limit <= lowest and highest <= limit:  # false too where there is a NaN
        return converted
    overflown = converted.isinf() & tensor.isfinite()
    if overflown.any():
        largest = tensor[overflown].abs().max().item()
        raise CheckpointError(
            f"{source}: tensor '{name}' holds {largest:g}, which {dtype_name(dtype)} cannot hold (its "
            f"largest number is {limit:g}); choose another dtype"
        )
    return converted


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor on the CPU as they lie in a file: row by row, little-endian."""
    width = tensor.element_size()
    values: npt.NDArray[Any] = tensor.detach().contiguous().view(_SAME_WIDTH_INTEGER[width]).numpy()
    return values.astype(f"<i{width}", copy=False).data


def cast_all(source: object, tensors: TensorSource, dtype: torch.dtype | None) -> TensorSource:
    """Return tensors that are :func:`cast` when they are read; ``None`` keeps each as it is."""
    if dtype is None:
        return tensors
    headers = {
        name: torch.empty(header.shape, dtype=dtype, device="meta")
        for name, header in tensors.headers.items()
    }
    return TensorSource(headers, lambda name: cast(source, name, tensors[name], dtype))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors agree in dtype, shape and every bit (so NaN equals itself, 0 is not -0)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    integer = _SAME_WIDTH_INTEGER[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def require_same_bits(path: Path, written: TensorSource, read: TensorSource) -> None:
    """Compare what was read back from ``path`` with what was to be written, one tensor at a time.

    Raises:
        CheckpointError: a name, dtype, shape or bit differs: the disk or the memory is at fault.
    """
    for name in sorted(written.keys() | read.keys()):
        if name not in written or name not in read or not same_bits(written[name], read[name]):
            raise CheckpointError(
                f"{path}: tensor '{name}' does not read back as it was written; check the disk"
            )
