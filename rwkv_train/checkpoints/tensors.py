"""Rules for a dictionary of weights (name -> tensor) that every file format shares."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights may be stored in, by the names that users write."""

_SAME_WIDTH_INTEGER = {2: torch.int16, 4: torch.int32}
"""Bytes of one weight -> the integer type with which its bits can be compared."""

_WRAPPER_PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, Lightning, torch.compile and training modules put before every name."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name users write for a dtype: ``torch.bfloat16`` -> ``"bf16"``."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def size_in_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the memory that the values of all tensors take, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_dense_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse anything but dense CPU tensors in float32, bfloat16 or float16.

    Raises:
        CheckpointError: it names the file, the tensor and what it is.
    """
    for name, tensor in tensors.items():
        if (
            tensor.device.type != "cpu"
            or tensor.layout != torch.strided
            or tensor.dtype not in DTYPES.values()
        ):
            raise CheckpointError(
                f"{path}: tensor '{name}' is {tensor.dtype}, {tensor.layout}, on {tensor.device}; weights "
                "must be dense, in float32, bfloat16 or float16"
            )


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes that wrappers put before every name.

    Example:
        >>> list(strip_wrappers({"module.model.emb.weight": torch.zeros(1)}))
        ['emb.weight']
    """
    stripped = dict(tensors)
    while stripped:
        prefix = next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in stripped)), None)
        if prefix is None:
            break
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


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


def with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, none of them part of another or of something larger.

    Writers need that: one stores all of the memory behind a view, the other refuses memory that is shared.
    """
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        if whole.untyped_storage().nbytes() != whole.nbytes or whole.data_ptr() in taken:
            whole = whole.clone()
        taken.add(whole.data_ptr())
        separate[name] = whole
    return separate


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors agree in dtype, shape and every bit (so NaN equals itself, 0 is not -0)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    integer = _SAME_WIDTH_INTEGER[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def require_same_bits(path: Path, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Compare what was read back from ``path`` with what was to be written.

    Raises:
        CheckpointError: a name, dtype, shape or bit differs: the disk or the memory is at fault.
    """
    for name in sorted(written.keys() | read.keys()):
        if name not in written or name not in read or not same_bits(written[name], read[name]):
            raise CheckpointError(
                f"{path}: tensor '{name}' does not read back as it was written; check the disk"
            )
