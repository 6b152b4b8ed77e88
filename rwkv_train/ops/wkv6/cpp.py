"""RWKV-6 on the CPU in C++ (``cuda/wkv6/wkv6_cpu.cpp``): float32 inside, whatever the dtype of the inputs."""

import ctypes
import functools

import torch
from torch import Tensor

from rwkv_train.ops.cpp import addresses, argument_types, as_float32, load_cpp_library
from rwkv_train.ops.registration import Recurrence, register_recurrence

CHECKPOINT_TOKENS = 32
"""Tokens from one kept state to the next; the source says the same, which loading checks."""


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library, built on first use; raises ``BackendError`` where it cannot be built."""
    library = load_cpp_library("wkv6")
    assert library.rwkv_wkv6_checkpoint_tokens() == CHECKPOINT_TOKENS
    library.rwkv_wkv6_forward.argtypes = argument_types(n_sizes=4, n_tensors=9)
    library.rwkv_wkv6_forward.restype = None
    library.rwkv_wkv6_backward.argtypes = argument_types(n_sizes=4, n_tensors=14)
    library.rwkv_wkv6_backward.restype = None
    return library


def _checkpoints_shape(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[int, ...]:
    batch, n_tokens, n_head, head_size = v.shape
    n_checkpoints = (n_tokens + CHECKPOINT_TOKENS - 1) // CHECKPOINT_TOKENS
    return batch, n_head, n_checkpoints, head_size, head_size


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [as_float32(x) for x in (r, w, k, v, u, state)]
    y = v.new_empty(v.shape, dtype=torch.float32)
    final_state = state.new_empty(state.shape, dtype=torch.float32)
    checkpoints = final_state.new_empty(
        _checkpoints_shape(r, w, k, v, u, state) if keep_checkpoints else (0,)
    )
    outputs = (y, final_state, checkpoints if keep_checkpoints else None)
    load().rwkv_wkv6_forward(*v.shape, *addresses(*inputs, *outputs), torch.get_num_threads())
    return y.to(v.dtype), final_state, checkpoints


def _backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, checkpoints: Tensor, dy: Tensor, d_final: Tensor
) -> tuple[Tensor, ...]:
    batch, _, n_head, head_size = v.shape
    inputs = [as_float32(x) for x in (r, w, k, v, u, checkpoints, dy, d_final)]
    by_row = (batch, n_head, head_size)  # the gradient of u, a row for each sequence
    shapes = (r.shape, w.shape, k.shape, v.shape, by_row, d_final.shape)
    gradients = [v.new_empty(shape, dtype=torch.float32) for shape in shapes]
    load().rwkv_wkv6_backward(*v.shape, *addresses(*inputs, *gradients), torch.get_num_threads())
    dr, dw, dk, dv, du, d_state = gradients
    found = (dr, dw, dk, dv, du.sum(0))
    return *(gradient.to(x.dtype) for gradient, x in zip(found, (r, w, k, v, u), strict=True)), d_state


wkv6_cpp = register_recurrence(
    Recurrence(
        name="wkv6_cpp",
        inputs=("r", "w", "k", "v", "u", "state"),
        dispatch_key="CPU",
        checkpoints_shape=_checkpoints_shape,
        forward=_forward,
        backward=_backward,
    )
)
