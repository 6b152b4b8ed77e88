"""RWKV-6 in plain tensor operations, on any device: chunks of tokens in parallel, their states one after the other.

Notation, for one head and one chunk of C tokens: ``H`` is the state before it, ``[key, value]`` (the transpose of
what the operator calls state), ``d = exp(w)``. With a C x C matrix of scores between tokens::

    y  = A v + r~ H                         A[t, s] = sum_n r_t k_s d_{s+1} .. d_{t-1}   for s < t
    H' = (d_1 .. d_C) H + k^T v             A[t, t] = sum_n r_t u k_t

``r~`` carries the decays from the start of the chunk to the token, without its own; ``k^`` those after it up to the
end. Only ``H' = decay H + added`` is a loop, and it is elementwise.

No decay overflows, however strong: scores are never ``exp(prefix) * exp(-prefix)``. A chunk is halved again and
again; between the tokens of a second half and those of the first half next to it, the decay is that from the
boundary to the one times that from the other to the boundary, both at most 1. Gradients follow the same halves, and
so the gradient of w is a sum of what passes through each decay, without cancellation.

Source: the recurrence of arXiv:2404.05892; the halves are those of the secondary chunking of gated linear attention
(Yang et al. 2023, arXiv:2312.06635), taken down to single tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.ops.by_sequence import torch_recurrence
from rwkv_train.ops.chunks import (
    STEP_TOKENS,
    chunk_tokens,
    cut,
    halves,
    join,
    segments,
    sum_after,
    sum_before,
)
from rwkv_train.ops.wkv6.reference import wkv6_reference


class _Chunks(NamedTuple):
    """Inputs of all chunks, each ``[M, C, N]`` with ``M = n_chunks * B * H`` (chunks slowest)."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor


class _Prepared(NamedTuple):
    """What the chunks' inputs give without the state."""

    scores: Tensor
    """``A``, ``[M, C, C]``."""
    from_start: Tensor
    """Decay from the start of the chunk to each token, without its own, ``[M, C, N]``."""
    to_end: Tensor
    """Decay after each token to the end of the chunk, ``[M, C, N]``."""
    decay: Tensor
    """All decays of a chunk, ``[M, N]``."""
    r_start: Tensor
    k_end: Tensor


class _Level(NamedTuple):
    """One halving of every chunk: pairs of blocks, the earlier is written (k), the later reads (r)."""

    half: int
    reading_decay: Tensor
    """From the boundary to each reading token, without its own, ``[M, n_blocks, half, N]``."""
    written_decay: Tensor
    """From each written token to the boundary."""


# ---- scores between the tokens of a chunk


def _levels(w: Tensor) -> Iterator[_Level]:
    half = w.shape[1] // 2
    while half:
        written, reading = halves(w, half)
        yield _Level(half, sum_before(reading).exp(), sum_after(written).exp())
        half //= 2


def _pairs(scores: Tensor, half: int) -> Tensor:
    """View the scores that a level is about, ``[M, n_blocks, half (r), half (k)]``."""
    n_blocks = scores.shape[1] // (2 * half)
    blocks = scores.view(-1, n_blocks, 2, half, n_blocks, 2, half)
    return blocks.select(5, 0).select(2, 1).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _scores(x: _Chunks, u: Tensor) -> Tensor:
    M, C, _ = x.r.shape
    scores = x.r.new_zeros(M, C, C)
    for level in _levels(x.w):
        reading, written = _level_operands(x, level)
        _pairs(scores, level.half).copy_(reading @ written.mT)
    scores.diagonal(dim1=1, dim2=2).copy_((x.r * u * x.k).sum(-1))
    return scores


def _level_operands(x: _Chunks, level: _Level) -> tuple[Tensor, Tensor]:
    """Return r of the reading tokens and k of the written ones, ``[M, n_blocks, half, N]``, with their decays."""
    reading = halves(x.r, level.half)[1] * level.reading_decay
    return reading, halves(x.k, level.half)[0] * level.written_decay


def _add_score_gradients(x: _Chunks, d_scores: Tensor, gradients: _Chunks) -> None:
    """Add what flows through the scores of different tokens to the gradients of r, w, k."""
    for level in _levels(x.w):
        reading, written = _level_operands(x, level)
        d_products = _pairs(d_scores, level.half)
        d_reading, d_written = d_products @ written, d_products.mT @ reading
        halves(gradients.r, level.half)[1].addcmul_(d_reading, level.reading_decay)
        halves(gradients.k, level.half)[0].addcmul_(d_written, level.written_decay)
        w_written, w_reading = halves(gradients.w, level.half)
        w_reading.add_(sum_after(d_reading * reading))
        w_written.add_(sum_before(d_written * written))


# ---- a segment: many chunks at once


def _prepare(x: _Chunks, u: Tensor) -> _Prepared:
    from_start, to_end = sum_before(x.w).exp(), sum_after(x.w).exp()
    return _Prepared(_scores(x, u), from_start, to_end, x.w.sum(1).exp(), x.r * from_start, x.k * to_end)


def _run_states(decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return ``H_0 .. H_n`` of ``H_{i+1} = decay_i H_i + added_i``, ``[n + 1, B * H, N, N]``."""
    n_states, head_size = start.shape[0], start.shape[-1]
    decay = decay.view(-1, n_states, head_size, 1)
    added = added.view(-1, *start.shape)
    states = start.new_empty(len(added) + 1, *start.shape)
    states[0] = start
    for i in range(len(added)):
        torch.addcmul(added[i], decay[i], states[i], out=states[i + 1])
    return states


def _forward_segment(x: _Chunks, u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return y ``[M, C, N]`` and the states before each chunk and after the last, ``[n + 1, B * H, N, N]``."""
    p = _prepare(x, u)
    states = _run_states(p.decay, p.k_end.mT @ x.v, start)
    return torch.baddbmm(p.scores @ x.v, p.r_start, states[:-1].flatten(0, 1)), states


def _backward_segment(
    x: _Chunks, u: Tensor, dy: Tensor, states: Tensor, d_final: Tensor
) -> tuple[_Chunks, Tensor, Tensor]:
    """Return the gradients of the inputs, of u (``[M, N]``) and of the segment's first state."""
    p = _prepare(x, u)
    before = states.flatten(0, 1)
    # The same recurrence backwards: d_before = decay d_after + added.
    by_chunk = (-1, *d_final.shape)
    d_states = _run_states(
        p.decay.view(by_chunk[:-1]).flip(0), (p.r_start.mT @ dy).view(by_chunk).flip(0), d_final
    )
    d_after = d_states[:-1].flip(0).flatten(0, 1)

    r_start, k_end = dy @ before.mT, x.v @ d_after.mT  # gradients of what has these names in p
    gradients = _Chunks(
        r=r_start * p.from_start,
        w=sum_after(p.r_start * r_start)
        + sum_before(p.k_end * k_end)
        + (p.decay * (before * d_after).sum(-1)).unsqueeze(1),
        k=k_end * p.to_end,
        v=torch.baddbmm(p.scores.mT @ dy, p.k_end, d_after),
    )
    d_scores = dy @ x.v.mT
    _add_score_gradients(x, d_scores, gradients)
    own = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # of each token with itself: no decay between
    gradients.r.addcmul_(own * u, x.k)
    gradients.k.addcmul_(own * u, x.r)
    return gradients, (own * x.r * x.k).sum(1), d_states[-1]


# ---- the operator


def checkpoints_shape(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[int, ...]:
    """Return the shape of the states that are kept, one before each chunk."""
    batch, n_tokens, n_head, head_size = v.shape
    n_chunk = chunk_tokens(v.device.type)
    return (n_tokens + n_chunk - 1) // n_chunk, batch * n_head, head_size, head_size


def _bonus_of_chunks(u: Tensor, x: _Chunks) -> Tensor:
    """Repeat u for every sequence and chunk, ``[M, 1, N]``."""
    return u.to(x.r.dtype).repeat(len(x.r) // len(u), 1).unsqueeze(1)


def forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final state and the states before each chunk; RWKV-5 is this with one w for all tokens."""
    n_chunk, n_tokens = chunk_tokens(v.device.type), v.shape[1]
    if n_tokens <= STEP_TOKENS and not keep_checkpoints:
        return *wkv6_reference(r, w, k, v, u, state), state.new_empty(0)
    now = state.flatten(0, 1).mT
    outputs, kept = [], []
    for tokens in segments(n_tokens):
        x = _Chunks(*(cut(y[:, tokens], n_chunk, state.dtype) for y in (r, w, k, v)))
        y, states = _forward_segment(x, _bonus_of_chunks(u, x), now)
        outputs.append(join(y, v[:, tokens]))
        now = states[-1]
        if keep_checkpoints:
            kept.append(states[:-1])
    final_state = now.mT.contiguous().view(state.shape)
    return torch.cat(outputs, dim=1), final_state, torch.cat(kept) if kept else state.new_empty(0)


def backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, checkpoints: Tensor, dy: Tensor, d_final: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs, the first state too."""
    n_chunk = chunk_tokens(v.device.type)
    inputs = (r, w, k, v)
    gradients = [x.new_empty(x.shape) for x in inputs]
    du = torch.zeros_like(u, dtype=checkpoints.dtype)
    d_state = d_final.flatten(0, 1).mT
    for tokens in reversed(segments(v.shape[1])):
        *parts, d_outputs = [cut(y[:, tokens], n_chunk, checkpoints.dtype) for y in (*inputs, dy)]
        x = _Chunks(*parts)
        states = checkpoints[tokens.start // n_chunk : -(-tokens.stop // n_chunk)]
        segment, d_bonus, d_state = _backward_segment(x, _bonus_of_chunks(u, x), d_outputs, states, d_state)
        for whole, part in zip(gradients, segment, strict=True):
            whole[:, tokens] = join(part, whole[:, tokens])
        du += d_bonus.view(-1, *u.shape).sum(0)
    return *gradients, du.to(u.dtype), d_state.mT.contiguous().view(d_final.shape)


wkv6_torch = torch_recurrence(
    "wkv6",
    inputs=("r", "w", "k", "v", "u", "state"),
    shared=("u",),
    checkpoint_tokens=chunk_tokens,
    checkpoints_shape=checkpoints_shape,
    forward=forward,
    backward=backward,
)
