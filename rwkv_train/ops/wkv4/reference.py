"""The definition of the RWKV-4 recurrence: a loop over tokens, never optimized; others are held to it."""

import torch
from torch import Tensor


def wkv4_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what :func:`rwkv_train.ops.wkv4.wkv4` defines, in the dtype of the state.

    The log scale ``p`` of the sums only keeps the exponentials finite: whatever it is, it cancels in ``y``.
    So it is a constant to the gradient.
    """
    w, u, keys, values = (x.to(state.dtype) for x in (w, u, k, v))
    numerator, denominator, p = state.unbind(1)  # [B, C] each
    outputs = []
    for t in range(v.shape[1]):
        now = torch.maximum(p, u + keys[:, t]).detach()
        past_scale, bonus = (p - now).exp(), (u + keys[:, t] - now).exp()
        outputs.append((past_scale * numerator + bonus * values[:, t]) / (past_scale * denominator + bonus))
        new_p = torch.maximum(p + w, keys[:, t]).detach()
        past_scale, weight = (p + w - new_p).exp(), (keys[:, t] - new_p).exp()
        numerator = past_scale * numerator + weight * values[:, t]
        denominator = past_scale * denominator + weight
        p = new_p
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(values)
    return y.to(v.dtype), torch.stack((numerator, denominator, p), dim=1)
