"""What two RWKV versions or more share: token shift, the norm of the heads, parts of the initial values."""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from rwkv_train.ops.context import SequenceContext


def shift_tokens(x: Tensor, last_x: Tensor, context: SequenceContext) -> Tensor:
    """Return what stands one position before each position of ``x``, in its own sequence.

    Args:
        x: ``[B, T, C]``.
        last_x: what stands before the first position of each sequence, ``[B, C]``, or ``[S, C]`` of a packed row;
            zeros at the start of a text.
        context: where sequences start.
    """
    if context.first is None:
        return torch.cat([last_x.to(x.dtype).unsqueeze(1), x[:, :-1]], dim=1)
    # A row too many: there lies what an empty sequence brings. Padded, not concatenated: PyTorch 2.13 compiles a
    # concatenation that is then written to such that x itself is overwritten.
    shifted = F.pad(x, (0, 0, 1, 0))
    return shifted.index_copy(1, context.first, last_x.to(x.dtype).unsqueeze(0))[:, :-1]


def last_token(x: Tensor, last_x: Tensor, context: SequenceContext) -> Tensor:
    """Return the last position of each sequence in ``x`` ``[B, T, C]`` as ``[B, C]``, or ``[S, C]`` of a packed row.

    ``last_x`` is what stands before each sequence; an empty one leaves it as it is.
    """
    if context.last is None or context.is_empty is None:
        return x[:, -1].clone()  # a view would keep all of x alive as long as the state
    return torch.where(context.is_empty, last_x.to(x.dtype), x[0].index_select(0, context.last))


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relu_squared(x: Tensor) -> Tensor:
    """Return ``max(x, 0) ** 2``, with a gradient that keeps one tensor of the size of ``x`` and not two."""
    y: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return y


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        positive: Tensor = ctx.saved_tensors[0]
        return (dy * positive).mul_(2)


class HeadNorm(nn.Module):
    """Normalize each head, then scale and shift each channel (the "ln_x" of a checkpoint).

    The same as a GroupNorm with one group for each head, which PyTorch computes several times slower.
    """

    def __init__(self, n_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(n_channels))
        self.bias = nn.Parameter(torch.empty(n_channels))

    def forward(self, y: Tensor) -> Tensor:
        """Normalize ``y`` ``[B, T, H, N]``; the result is ``[B, T, H * N]`` in float32 or float64."""
        normalized = F.layer_norm(at_least_float32(y), y.shape[-1:], eps=self.eps).flatten(2)
        return torch.addcmul(self.bias, normalized, self.weight)


def layer_ratios(layer_index: int, n_layer: int) -> tuple[float, float]:
    """Return how deep a layer lies: ``l / (L - 1)``, from 0 to 1, and ``1 - l / L``, from 1 to almost 0.

    A model of one layer is all first layer: its first ratio, published as 0 / 0, is 0.
    """
    return layer_index / max(n_layer - 1, 1), 1.0 - layer_index / n_layer


def channel_ratios(n_channels: int) -> Tensor:
    """Return ``i / C`` for each channel: the base of every published token-shift mix. Float32, on the CPU."""
    return torch.arange(n_channels, dtype=torch.float32, device="cpu") / n_channels


def full_channel_ratios(n_channels: int) -> Tensor:
    """Return ``i / (C - 1)`` for each channel: from 0 to 1, both included. Float32, on the CPU."""
    return torch.arange(n_channels, dtype=torch.float32, device="cpu") / max(n_channels - 1, 1)


def uniform(rows: int, columns: int, bound: float, generator: Generator) -> Tensor:
    """Return a float32 matrix of numbers between minus and plus ``bound``."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )


def orthogonal(rows: int, columns: int, generator: Generator, gain: float = 1.0) -> Tensor:
    """Return a float32 matrix with orthogonal rows or columns, whichever are fewer, of length ``gain``."""
    matrix = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    return nn.init.orthogonal_(matrix, gain, generator=generator)


def gain_of_shape(rows: int, columns: int) -> float:
    """Return ``sqrt(rows / columns)`` for a tall matrix and 1 for any other."""
    return math.sqrt(max(rows / columns, 1.0))
