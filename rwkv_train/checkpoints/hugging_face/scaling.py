"""A weight times a power of two, and back, without the loss of a bit; made piece by piece, for large ones."""

import torch
from torch import Tensor

from rwkv_train.errors import CheckpointError

_PIECE_NUMEL = 1 << 22
"""Weights in one piece: their copies in a check take little memory beside the result."""


def multiplied(name: str, tensor: Tensor, factor: float) -> Tensor:
    """Return ``tensor * factor`` in the dtype of ``tensor``.

    Args:
        name: what messages call it.
        tensor: any weight.
        factor: a power of two.

    Raises:
        CheckpointError: a weight is too large or too small for that.
    """
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    pieces = torch.split(tensor.reshape(-1), _PIECE_NUMEL)
    for piece, target in zip(pieces, torch.split(result.view(-1), _PIECE_NUMEL), strict=True):
        torch.mul(piece, factor, out=target)
        nan = piece.isnan()
        if nan.any():
            target[nan] = piece[nan]  # arithmetic keeps that it is none, but not its bits
        if not ((target / factor == piece) | nan).all():
            raise CheckpointError(
                f"{name} holds a number that cannot be multiplied by {factor:g} in {tensor.dtype} without loss; "
                "choose another dtype"
            )
    return result


def divided(name: str, tensor: Tensor, factor: float) -> Tensor:
    """Return ``tensor / factor``; otherwise as :func:`multiplied`."""
    return multiplied(name, tensor, 1 / factor)
