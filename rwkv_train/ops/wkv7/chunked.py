"""RWKV-7 in plain tensor operations, on any device: chunks of tokens in parallel, one product a chunk in sequence.

Notation, for one head and one chunk of C tokens: ``H`` is the state before it, ``[key, value]`` (the transpose of
what the operator calls state), ``d = exp(w)``. With ``u_t = a_t H_{t-1}``, what token t takes out, the recurrence
over tokens becomes, with C x C matrices of scores between tokens::

    u   = (I - ab)^-1 (ak v + a~ H)          ab[t, s] = sum_n a_t b_s d_{s+1} .. d_{t-1}   for s < t
    y   = qk v + qb u + r~ H                 qk[t, s] = sum_n r_t k_s d_{s+1} .. d_t       for s <= t
    H'  = (d_1 .. d_C) H + k^T v + b^T u     ak, qb likewise

``a~``, ``r~`` carry the decays from the start of the chunk, ``k^``, ``b^`` those up to its end. So
``H' = P H + K`` with ``P`` and ``K`` known for all chunks at once, and only this product is a loop.

No decay overflows: scores are never ``exp(prefix) * exp(-prefix)``. A chunk is halved again and again; between
the tokens of a second half and those of the first half next to it, the decay is that from the boundary to the one
times that from the other to the boundary, both at most 1. Gradients follow the same halves, and so the gradient
of w is a sum of what passes through each decay, without cancellation.

Source: the formulas are those of the "WY" form of products of Householder-like matrices (Bischof, Van Loan 1987),
applied to the recurrence of arXiv:2503.14456.
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
    sum_from,
    sum_upto,
)
from rwkv_train.ops.wkv7.reference import wkv7_reference


class _Chunks(NamedTuple):
    """Inputs of all chunks, each ``[M, C, N]`` with ``M = n_chunks * B * H`` (chunks slowest)."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class _Prepared(NamedTuple):
    """What the chunks' inputs give without the state."""

    scores: Tensor
    """``[[qk, qb], [ak, ab]]``, ``[M, 2C, 2C]``."""
    r_start: Tensor
    a_start: Tensor
    k_end: Tensor
    b_end: Tensor
    decay: Tensor
    """All decays of a chunk, ``[M, N]``."""
    u_without: Tensor
    """u for a zero state, ``[M, C, N]``."""
    u_of_state: Tensor
    """``[M, C, N]``: times ``H`` this is the rest of u."""
    transition: Tensor
    """``P``, ``[M, N, N]``."""


class _Level(NamedTuple):
    """One halving of every chunk: pairs of blocks, the earlier is written (k, b), the later reads (r, a)."""

    half: int
    r_decay: Tensor
    """From the boundary to each reading token, ``[M, n_blocks, half, N]``; with its own decay."""
    a_decay: Tensor
    """The same without its own decay."""
    written_decay: Tensor
    """From each written token to the boundary."""


# ---- scores between the tokens of a chunk


def _levels(w: Tensor) -> Iterator[_Level]:
    half = w.shape[1] // 2
    while half:
        written, reading = halves(w, half)
        yield _Level(half, sum_upto(reading).exp(), sum_before(reading).exp(), sum_after(written).exp())
        half //= 2


def _pairs(scores: Tensor, half: int) -> Tensor:
    """View the scores that a level is about, ``[M, n_blocks, 2 (r, a), half, 2 (k, b), half]``."""
    M, n_chunk = scores.shape[0], scores.shape[1] // 2
    blocks = scores.view(M, 2, n_chunk // (2 * half), 2, half, 2, n_chunk // (2 * half), 2, half)
    pairs = blocks.select(7, 0).select(3, 1)  # [M, 2, n_blocks, half, 2, n_blocks, half]
    return pairs.diagonal(dim1=2, dim2=5).permute(0, 5, 1, 2, 3, 4)


def _own_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """View the scores of each token with itself, of r with k and with b, ``[M, C]`` each."""
    C = scores.shape[1] // 2
    return scores[:, :C, :C].diagonal(dim1=1, dim2=2), scores[:, :C, C:].diagonal(dim1=1, dim2=2)


def _scores(x: _Chunks) -> Tensor:
    M, C, _ = x.r.shape
    scores = x.r.new_zeros(M, 2 * C, 2 * C)
    for level in _levels(x.w):
        reading, written = _level_operands(x, level)
        products = reading.flatten(2, 3) @ written.flatten(2, 3).mT
        _pairs(scores, level.half).copy_(products.view(M, -1, 2, level.half, 2, level.half))
    own_k, own_b = _own_scores(scores)
    own_k.copy_((x.r * x.k).sum(-1))
    own_b.copy_((x.r * x.b).sum(-1))
    return scores


def _level_operands(x: _Chunks, level: _Level) -> tuple[Tensor, Tensor]:
    """Return (r, a) of the reading tokens and (k, b) of the written ones, ``[M, n_blocks, 2, half, N]`` each."""
    reading = (halves(x.r, level.half)[1] * level.r_decay, halves(x.a, level.half)[1] * level.a_decay)
    written = (halves(y, level.half)[0] * level.written_decay for y in (x.k, x.b))
    return torch.stack(reading, 2), torch.stack(tuple(written), 2)


def _add_score_gradients(x: _Chunks, d_scores: Tensor, gradients: _Chunks) -> None:
    """Add what flows through the scores to the gradients of r, w, k, a, b."""
    for level in _levels(x.w):
        reading, written = _level_operands(x, level)
        d_products = _pairs(d_scores, level.half).flatten(4, 5).flatten(2, 3)
        d_reading = (d_products @ written.flatten(2, 3)).view_as(reading)
        d_written = (d_products.mT @ reading.flatten(2, 3)).view_as(written)
        d_r, d_a = d_reading.unbind(2)
        d_k, d_b = d_written.unbind(2)
        halves(gradients.r, level.half)[1].addcmul_(d_r, level.r_decay)
        halves(gradients.a, level.half)[1].addcmul_(d_a, level.a_decay)
        halves(gradients.k, level.half)[0].addcmul_(d_k, level.written_decay)
        halves(gradients.b, level.half)[0].addcmul_(d_b, level.written_decay)
        through_r, through_a = (d_reading * reading).unbind(2)
        through_written = (d_written * written).sum(2)
        w_written, w_reading = halves(gradients.w, level.half)
        w_reading.add_(sum_from(through_r)).add_(sum_after(through_a))
        w_written.add_(sum_before(through_written))
    own_k, own_b = (own.unsqueeze(-1) for own in _own_scores(d_scores))
    gradients.r.addcmul_(own_k, x.k).addcmul_(own_b, x.b)
    gradients.k.addcmul_(own_k, x.r)
    gradients.b.addcmul_(own_b, x.r)


# ---- a segment: many chunks at once


def _prepare(x: _Chunks) -> _Prepared:
    C, N = x.r.shape[1:]
    scores = _scores(x)
    to_end = sum_after(x.w).exp()
    r_start, a_start = x.r * sum_upto(x.w).exp(), x.a * sum_before(x.w).exp()
    k_end, b_end = x.k * to_end, x.b * to_end
    decay = x.w.sum(1).exp()
    right = torch.cat((scores[:, C:, :C] @ x.v, a_start), dim=-1)
    solved = torch.linalg.solve_triangular(-scores[:, C:, C:], right, upper=False, unitriangular=True)
    u_without, u_of_state = solved.split(N, dim=-1)
    transition = b_end.mT @ u_of_state
    transition.diagonal(dim1=1, dim2=2).add_(decay)
    return _Prepared(scores, r_start, a_start, k_end, b_end, decay, u_without, u_of_state, transition)


def _run_states(transition: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return ``H_0 .. H_n`` of ``H_{i+1} = transition_i H_i + added_i``, ``[n + 1, B * H, N, N]``."""
    n_states, head_size = start.shape[0], start.shape[-1]
    transition = transition.view(-1, n_states, head_size, head_size)
    added = added.view_as(transition)
    states = start.new_empty(len(transition) + 1, n_states, head_size, head_size)
    states[0] = start
    for i in range(len(transition)):
        torch.baddbmm(added[i], transition[i], states[i], out=states[i + 1])
    return states


def _forward_segment(x: _Chunks, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return y ``[M, C, N]`` and the states before each chunk and after the last, ``[n + 1, B * H, N, N]``."""
    C = x.r.shape[1]
    p = _prepare(x)
    states = _run_states(p.transition, p.k_end.mT @ x.v + p.b_end.mT @ p.u_without, start)
    before = states[:-1].flatten(0, 1)
    u = torch.baddbmm(p.u_without, p.u_of_state, before)
    y = torch.baddbmm(p.scores[:, :C] @ torch.cat((x.v, u), dim=1), p.r_start, before)
    return y, states


def _backward_segment(x: _Chunks, dy: Tensor, states: Tensor, d_final: Tensor) -> tuple[_Chunks, Tensor]:
    """Return the gradients of the inputs and of the segment's first state, from those of y and its last one."""
    C = x.r.shape[1]
    p = _prepare(x)
    before = states.flatten(0, 1)
    u = torch.baddbmm(p.u_without, p.u_of_state, before)
    qk, qb = p.scores[:, :C, :C], p.scores[:, :C, C:]
    ak, ab = p.scores[:, C:, :C], p.scores[:, C:, C:]

    # The same recurrence backwards: d_before = transition^T d_after + added.
    du_direct = qb.mT @ dy
    added = p.r_start.mT @ dy + p.u_of_state.mT @ du_direct
    order = torch.arange(len(states) - 1, -1, -1, device=dy.device)
    by_chunk = (-1, *d_final.shape)
    d_states = _run_states(p.transition.mT.reshape(by_chunk)[order], added.view(by_chunk)[order], d_final)
    d_after = d_states[:-1][order].flatten(0, 1)

    du = torch.baddbmm(du_direct, p.b_end, d_after)
    # What flows into the right-hand side of the triangular system.
    d_right = torch.linalg.solve_triangular(-ab.mT, du, upper=True, unitriangular=True)
    dv = torch.baddbmm(qk.mT @ dy + ak.mT @ d_right, p.k_end, d_after)
    d_scores = torch.cat((dy, d_right), dim=1) @ torch.cat((x.v, u), dim=1).mT

    r_start, a_start = dy @ before.mT, d_right @ before.mT  # gradients of what has these names in p
    k_end, b_end = x.v @ d_after.mT, u @ d_after.mT
    to_end = sum_after(x.w).exp()
    gradients = _Chunks(
        r=r_start * sum_upto(x.w).exp(),
        w=sum_from(p.r_start * r_start)
        + sum_after(p.a_start * a_start)
        + sum_before(p.k_end * k_end + p.b_end * b_end)
        + (p.decay * (before * d_after).sum(-1)).unsqueeze(1),
        k=k_end * to_end,
        v=dv,
        a=a_start * sum_before(x.w).exp(),
        b=b_end * to_end,
    )
    _add_score_gradients(x, d_scores, gradients)
    return gradients, d_states[-1]


# ---- the operator


def _checkpoints_shape(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[int, ...]:
    batch, n_tokens, n_head, head_size = v.shape
    n_chunk = chunk_tokens(v.device.type)
    return (n_tokens + n_chunk - 1) // n_chunk, batch * n_head, head_size, head_size


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n_chunk, n_tokens = chunk_tokens(v.device.type), v.shape[1]
    if n_tokens <= STEP_TOKENS and not keep_checkpoints:
        return *wkv7_reference(r, w, k, v, a, b, state), state.new_empty(0)
    now = state.flatten(0, 1).mT
    outputs, kept = [], []
    for tokens in segments(n_tokens):
        x = _Chunks(*(cut(y[:, tokens], n_chunk, state.dtype) for y in (r, w, k, v, a, b)))
        y, states = _forward_segment(x, now)
        outputs.append(join(y, v[:, tokens]))
        now = states[-1]
        if keep_checkpoints:
            kept.append(states[:-1])
    final_state = now.mT.contiguous().view(state.shape)
    return torch.cat(outputs, dim=1), final_state, torch.cat(kept) if kept else state.new_empty(0)


def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    checkpoints: Tensor,
    dy: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, ...]:
    n_chunk = chunk_tokens(v.device.type)
    inputs = (r, w, k, v, a, b)
    gradients = [x.new_empty(x.shape) for x in inputs]
    d_state = d_final.flatten(0, 1).mT
    for tokens in reversed(segments(v.shape[1])):
        parts = [cut(y[:, tokens], n_chunk, checkpoints.dtype) for y in (*inputs, dy)]
        states = checkpoints[tokens.start // n_chunk : -(-tokens.stop // n_chunk)]
        segment, d_state = _backward_segment(_Chunks(*parts[:-1]), parts[-1], states, d_state)
        for whole, part in zip(gradients, segment, strict=True):
            whole[:, tokens] = join(part, whole[:, tokens])
    return *gradients, d_state.mT.contiguous().view(d_final.shape)


wkv7_torch = torch_recurrence(
    "wkv7",
    inputs=("r", "w", "k", "v", "a", "b", "state"),
    checkpoint_tokens=chunk_tokens,
    checkpoints_shape=_checkpoints_shape,
    forward=_forward,
    backward=_backward,
)
