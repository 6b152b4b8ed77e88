"""Inputs on which the kernels on tensor cores are held to bounds, and measured by ``tests.ops.kernel_errors``.

What decides about errors is how alike the keys are that a head removes and writes, how much a token removes (its gate),
and how fast states decay. All that the kernels read in bfloat16 is bfloat16 here, so that an error is none of inputs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.conftest import Problem

KEY_CORRELATION = 0.5
"""Of a key with the one before it, where keys are like those of a model."""
PARALLEL_SPREAD = 0.1
"""Of nearly parallel keys around their direction, in units of their length."""


class Case(NamedTuple):
    """What inputs are like."""

    decay: tuple[float, float]
    """Smallest and largest ``-w``: of channels uniform in its logarithm, of tokens near that of the channel."""
    keys: str = "correlated"
    """``"correlated"``: a mean and what changes from token to token; ``"random"``; ``"parallel"``: nearly so."""
    gate: float = 0.0
    """Of wkv7: mean of what goes through a sigmoid to be the part that a token removes."""


WKV7_CASES = {
    "realistic": Case((1e-3, 0.3)),
    "fast decay": Case((0.604, 0.6065)),
    "gates near 1": Case((1e-4, 1e-2), keys="random", gate=5.0),
    "parallel keys, decay": Case((1e-2, 0.6065), keys="parallel", gate=5.0),
    "parallel keys": Case((0.0, 0.0), keys="parallel", gate=5.0),
}
LINEAR_CASES = {
    "realistic": Case((math.exp(-8), math.exp(2))),
    "slow decay": Case((math.exp(-8), math.exp(-8))),
    "fast decay": Case((1.0, math.exp(2))),
    "unbounded decay": Case((math.exp(-8), math.exp(5))),
    "parallel keys": Case((math.exp(-8), math.exp(2)), keys="parallel"),
}
CASES = {"wkv7": WKV7_CASES, "wkv6": LINEAR_CASES, "wkv5": LINEAR_CASES}


def make_problem(
    op: str, case: Case, n_tokens: int, batch: int = 1, n_head: int = 1, head_size: int = 64, seed: int = 0
) -> Problem:
    """Return the inputs of an operator that are as a case says; log decay and states float32, all else bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape, state_shape = (batch, n_tokens, n_head, head_size), (batch, n_head, head_size, head_size)
    keys = _keys(case, random, shape)
    w = _log_decay(case, generator, (n_head, head_size), None if op == "wkv5" else shape)
    r, v, dy = (random(*shape) for _ in range(3))
    state, d_final = random(*state_shape), random(*state_shape)
    if op == "wkv7":
        removed = F.normalize(keys, dim=-1)
        gate = torch.sigmoid(case.gate + random(*shape))
        inputs = [r, w, 0.5 * keys, v, -removed, removed * gate, state]
    else:
        inputs = [r, w, 0.5 * keys, v, random(n_head, head_size), state]
    rounded = tuple(x if x is w or x is state else x.bfloat16() for x in inputs)
    return Problem(rounded, dy.bfloat16(), d_final)


def make_packed_problem(
    op: str, case: Case, lengths: Sequence[int], n_head: int = 1, head_size: int = 64
) -> Problem:
    """Return the same of one row that holds sequences of these lengths, each with a state of its own."""
    row = make_problem(op, case, sum(lengths), 1, n_head, head_size)
    states = make_problem(op, case, 1, len(lengths), n_head, head_size)
    return Problem((*row.inputs[:-1], states.inputs[-1]), row.dy, states.d_final)


def _keys(case: Case, random, shape) -> Tensor:
    """Return keys [B, T, H, N], their elements near 1 in size."""
    batch, n_tokens, n_head, head_size = shape
    new = random(*shape)
    if case.keys == "random":
        return new
    mean = random(1, 1, n_head, head_size)
    if case.keys == "parallel":
        return mean + PARALLEL_SPREAD * new
    changing = torch.empty(shape)
    before = random(batch, n_head, head_size)
    for t in range(n_tokens):
        before = KEY_CORRELATION * before + math.sqrt(1 - KEY_CORRELATION**2) * new[:, t]
        changing[:, t] = before
    return 0.5 * mean + changing


def _log_decay(case, generator, by_channel, by_token) -> Tensor:
    """Return the log decay, float32, of channels alone where ``by_token`` is None."""
    smallest, largest = case.decay
    if largest == 0.0:
        return torch.zeros(by_token or by_channel)
    low, high = math.log(smallest), math.log(largest)
    raw = low + (high - low) * torch.rand(by_channel, generator=generator)
    if by_token is not None:
        raw = raw + 0.5 * torch.randn(by_token, generator=generator)
    return -raw.clamp(low, high).exp()
