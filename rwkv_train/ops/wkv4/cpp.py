"""RWKV-4 on the CPU in C++ (``cuda/wkv4/wkv4_cpu.cpp``): float32 inside, whatever the dtype of the inputs."""

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
    library = load_cpp_library("wkv4")
    assert library.rwkv_wkv4_checkpoint_tokens() == CHECKPOINT_TOKENS
    library.rwkv_wkv4_forward.argtypes = argument_types(n_sizes=3, n_tensors=8)
    library.rwkv_wkv4_forward.restype = None
    library.rwkv_wkv4_backward.argtypes = argument_types(n_sizes=3, n_tensors=12)
    library.rwkv_wkv4_backward.restype = None
    return library


def _checkpoints_shape(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[int, ...]:
    batch, n_tokens, n_embd = v.shape
    return batch, (n_tokens + CHECKPOINT_TOKENS - 1) // CHECKPOINT_TOKENS, 3, n_embd


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [as_float32(x) for x in (w, u, k, v, state)]
    y = v.new_empty(v.shape, dtype=torch.float32)
    final_state = state.new_empty(state.shape, dtype=torch.float32)
    checkpoints = final_state.new_empty(_checkpoints_shape(w, u, k, v, state) if keep_checkpoints else (0,))
    outputs = (y, final_state, checkpoints if keep_checkpoints else None)
    load().rwkv_wkv4_forward(*v.shape, *addresses(*inputs, *outputs), torch.get_num_threads())
    return y.to(v.dtype), final_state, checkpoints


def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, checkpoints: Tensor, dy: Tensor, d_final: Tensor
) -> tuple[Tensor, ...]:
    batch, _, n_embd = v.shape
    inputs = [as_float32(x) for x in (w, u, k, v, checkpoints, dy, d_final)]
    by_row = (batch, n_embd)  # the gradients of w and u, one row a sequence
    shapes = (by_row, by_row, k.shape, v.shape, d_final.shape)
    gradients = [v.new_empty(shape, dtype=torch.float32) for shape in shapes]
    load().rwkv_wkv4_backward(*v.shape, *addresses(*inputs, *gradients), torch.get_num_threads())
    dw, du, dk, dv, d_state = gradients
    return dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dk.to(k.dtype), dv.to(v.dtype), d_state


wkv4_cpp = register_recurrence(
    Recurrence(
        name="wkv4_cpp",
        inputs=("w", "u", "k", "v", "state"),
        dispatch_key="CPU",
        checkpoints_shape=_checkpoints_shape,
        forward=_forward,
        backward=_backward,
    )
)
