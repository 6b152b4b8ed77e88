"""RWKV-4 in plain tensor operations, on any device: about 2 sqrt(T) steps in sequence instead of T.

A decayed sum ``S_t = exp(w) S_{t-1} + exp(p_t) x_t`` is kept as ``s exp(p)`` with a running log scale ``p``, so
that no exponential is of a positive number. The tokens are cut into about sqrt(T) chunks of about sqrt(T) tokens:
first all chunks go through their tokens side by side, each from an empty sum; then the sums run from chunk to
chunk; then every token adds what its chunk started with. The backward pass is the same sum, backwards in time.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.ops.by_sequence import ONE_A_SEQUENCE, torch_recurrence

EMPTY = -1e38
"""Log scale of a sum to which nothing has been added; finite, so that differences of two are no NaN."""


class Sums(NamedTuple):
    """Two decayed sums with one log scale: ``values * exp(scale)``."""

    values: Tensor
    """``[2, ..., C]``"""
    scale: Tensor
    """``[..., C]``"""


def _add(x: Sums, y: Sums) -> Sums:
    scale = torch.maximum(x.scale, y.scale)
    values = x.values * (x.scale - scale).exp() + y.values * (y.scale - scale).exp()
    return Sums(values, scale)


def _decayed(x: Sums, log_decay: Tensor) -> Sums:
    return Sums(x.values, x.scale + log_decay)


def decayed_sums(w: Tensor, added: Sums, start: Sums) -> Sums:
    """Return the sums after each token of ``S_t = exp(w) S_{t-1} + added_t``.

    Args:
        w: log decay, ``[C]``, every value <= 0.
        added: what each token adds, values ``[2, B, T, C]``, scale ``[B, T, C]``.
        start: the sums before the first token, values ``[2, B, C]``, scale ``[B, C]``.

    Returns:
        Sums shaped like ``added``.
    """
    n_tokens = added.scale.shape[1]
    n_chunk = max(1, math.isqrt(n_tokens))
    padding = (0, 0, 0, -n_tokens % n_chunk)
    values = torch.unflatten(F.pad(added.values, padding), 2, (-1, n_chunk))  # [2, B, chunks, tokens, C]
    scale = torch.unflatten(F.pad(added.scale, padding, value=EMPTY), 1, (-1, n_chunk))

    inside = [Sums(values[:, :, :, 0], scale[:, :, 0])]
    for i in range(1, n_chunk):
        inside.append(_add(_decayed(inside[-1], w), Sums(values[:, :, :, i], scale[:, :, i])))
    before = [start]
    for i in range(scale.shape[1] - 1):
        last = Sums(inside[-1].values[:, :, i], inside[-1].scale[:, i])
        before.append(_add(_decayed(before[-1], n_chunk * w), last))

    from_chunk = _stack(inside, dim=2)
    from_start = _stack(before, dim=1)
    age = torch.arange(1, n_chunk + 1, device=w.device, dtype=w.dtype).unsqueeze(-1)
    carried = Sums(from_start.values.unsqueeze(3), from_start.scale.unsqueeze(2) + age * w)
    total = _add(carried, from_chunk)
    return Sums(total.values.flatten(2, 3)[:, :, :n_tokens], total.scale.flatten(1, 2)[:, :n_tokens])


def _stack(sums: list[Sums], dim: int) -> Sums:
    """Stack sums along a new dimension of their scales."""
    return Sums(torch.stack([x.values for x in sums], dim + 1), torch.stack([x.scale for x in sums], dim))


def _shifted(first: Sums, rest: Sums) -> Sums:
    """Put ``first`` before the sums of each token and drop the last: what each token finds."""
    values = torch.cat((first.values.unsqueeze(2), rest.values[:, :, :-1]), dim=2)
    return Sums(values, torch.cat((first.scale.unsqueeze(1), rest.scale[:, :-1]), dim=1))


def _reversed(x: Sums) -> Sums:
    return Sums(x.values.flip(2), x.scale.flip(1))


def _of_state(state: Tensor) -> Sums:
    return Sums(state[:, :2].transpose(0, 1), state[:, 2])


class _Pass(NamedTuple):
    """What both passes need of every token."""

    found: Sums
    """Numerator and denominator before the token."""
    after: Sums
    """The same after it."""
    scale: Tensor
    """Log scale of the two below, ``[B, T, C]``."""
    bonus: Tensor
    """Weight of the token itself."""
    denominator: Tensor
    y: Tensor


def _run(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> _Pass:
    start = _of_state(state)
    after = decayed_sums(w, Sums(torch.stack((v, torch.ones_like(v))), k), start)
    found = _shifted(start, after)
    scale = torch.maximum(found.scale, u + k)
    past, bonus = (found.scale - scale).exp(), (u + k - scale).exp()
    denominator = past * found.values[1] + bonus
    y = (past * found.values[0] + bonus * v) / denominator
    return _Pass(found, after, scale, bonus, denominator, y)


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state.dtype
    x = _run(w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype), state)
    final_state = torch.cat((x.after.values[:, :, -1].transpose(0, 1), x.after.scale[:, -1:]), dim=1)
    return x.y.to(v.dtype), final_state, state.clone() if keep_checkpoints else state.new_empty(0)


def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, checkpoints: Tensor, dy: Tensor, d_final: Tensor
) -> tuple[Tensor, ...]:
    state, given = checkpoints, (w, u, k, v)
    w, u, k, v, dy = (y.to(state.dtype) for y in (w, u, k, v, dy))
    x = _run(w, u, k, v, state)
    # Gradients of the two sums after each token: a decayed sum again, from the last token to the first.
    q = dy / x.denominator  # times exp(-x.scale)
    last = Sums(d_final[:, :2].transpose(0, 1), -x.after.scale[:, -1])
    before_each = _reversed(decayed_sums(w, _reversed(Sums(torch.stack((q, -q * x.y)), -x.scale)), last))
    after_each = _reversed(_shifted(last, _reversed(before_each)))

    through_sums = (k + after_each.scale).exp()
    through_bonus = x.bonus * (v - x.y) * q
    dk = through_sums * (after_each.values[0] * v + after_each.values[1]) + through_bonus
    dv = through_sums * after_each.values[0] + x.bonus * q
    decay_scale = (w + x.found.scale + after_each.scale).exp()
    dw = (decay_scale * (after_each.values * x.found.values).sum(0)).sum((0, 1))
    # From the gradients of numerator * exp(p) and denominator * exp(p) to those of the three.
    d_sums = before_each.values[:, :, 0] * (state[:, 2] + before_each.scale[:, 0]).exp()
    d_scale = (d_sums * state[:, :2].transpose(0, 1)).sum(0)
    d_state = torch.cat((d_sums.transpose(0, 1), d_scale.unsqueeze(1)), dim=1)
    gradients = (dw, through_bonus.sum((0, 1)), dk, dv)
    return *(gradient.to(y.dtype) for gradient, y in zip(gradients, given, strict=True)), d_state


def _checkpoints_shape(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[int, ...]:
    return tuple(state.shape)  # the first state; all others are computed again


wkv4_torch = torch_recurrence(
    "wkv4",
    inputs=("w", "u", "k", "v", "state"),
    shared=("w", "u"),
    checkpoint_tokens=lambda device_type: ONE_A_SEQUENCE,
    checkpoints_shape=_checkpoints_shape,
    forward=_forward,
    backward=_backward,
)
