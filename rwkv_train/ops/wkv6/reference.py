"""The definition of the RWKV-6 recurrence: a loop over tokens, never optimized; others are held to it."""

import torch
from torch import Tensor


def wkv6_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`rwkv_train.ops.wkv6.wkv6` defines, in the dtype of the state."""
    r, w, k, u = (x.to(state.dtype) for x in (r, w, k, u))
    values = v.to(state.dtype)
    outputs = []
    for t in range(v.shape[1]):
        value = values[:, t].unsqueeze(-1)  # [B, H, value, 1]
        with_bonus = state + value * (u * k[:, t]).unsqueeze(-2)  # [B, H, value, key]
        outputs.append((with_bonus @ r[:, t].unsqueeze(-1)).squeeze(-1))
        state = state * w[:, t].exp().unsqueeze(-2) + value * k[:, t].unsqueeze(-2)
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(values)
    return y.to(v.dtype), state if outputs else state.clone()
