"""RWKV-5 in plain tensor operations: RWKV-6 with one decay for all tokens, whose gradients add up."""

from torch import Tensor

from rwkv_train.ops.by_sequence import torch_recurrence
from rwkv_train.ops.chunks import chunk_tokens
from rwkv_train.ops.wkv6 import chunked as wkv6


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return wkv6.forward(r, w.expand(r.shape), k, v, u, state, keep_checkpoints)


def _backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, checkpoints: Tensor, dy: Tensor, d_final: Tensor
) -> tuple[Tensor, ...]:
    # Cast before it is repeated: the gradients of the tokens add up in the dtype that the repeated w has.
    by_token = w.to(checkpoints.dtype).expand(r.shape)
    dr, dw, *others = wkv6.backward(r, by_token, k, v, u, checkpoints, dy, d_final)
    return dr, dw.sum((0, 1)).to(w.dtype), *others


wkv5_torch = torch_recurrence(
    "wkv5",
    inputs=("r", "w", "k", "v", "u", "state"),
    shared=("w", "u"),
    checkpoint_tokens=chunk_tokens,
    checkpoints_shape=wkv6.checkpoints_shape,
    forward=_forward,
    backward=_backward,
)
