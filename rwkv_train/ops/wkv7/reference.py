"""The definition of the RWKV-7 recurrence: a loop over tokens, never optimized; others are held to it."""

import torch
from torch import Tensor


def wkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`rwkv_train.ops.wkv7.wkv7` defines, in the dtype of the state."""
    r, w, k, a, b = (x.to(state.dtype) for x in (r, w, k, a, b))
    values = v.to(state.dtype)
    outputs = []
    for t in range(v.shape[1]):
        decayed = state * w[:, t].exp().unsqueeze(-2)  # [B, H, value, key]
        removed = state @ a[:, t].unsqueeze(-1)  # [B, H, value, 1]
        state = decayed + removed * b[:, t].unsqueeze(-2) + values[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(values)
    return y.to(v.dtype), state if outputs else state.clone()
