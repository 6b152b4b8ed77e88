"""Inputs for the recurrences, from a seeded generator."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


class Problem(NamedTuple):
    """Inputs of a recurrence in the order of its arguments, and gradients to send back."""

    inputs: tuple[Tensor, ...]
    dy: Tensor
    d_final: Tensor


def _wkv7(batch=2, n_tokens=21, n_head=2, head_size=8, decay="model", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (batch, n_tokens, n_head, head_size)
    w = {
        "model": lambda: -0.6065 * torch.sigmoid(random(*shape)),
        "none": lambda: torch.zeros(shape),
        "strong": lambda: torch.full(shape, -20.0),
        "total": lambda: torch.full(shape, -1000.0),
        "mixed": lambda: -torch.exp(3 * random(*shape)),  # from 1e-4 to 1e4
    }[decay]()
    removed = F.normalize(random(*shape), dim=-1)
    gate = torch.sigmoid(random(*shape))
    inputs = (
        random(*shape),
        w,
        0.5 * random(*shape),
        random(*shape),
        -removed,
        removed * gate,
        random(batch, n_head, head_size, head_size),
    )
    return Problem(inputs, random(*shape), random(batch, n_head, head_size, head_size))


def _wkv4(batch=2, n_tokens=21, n_embd=6, decay="model", key_scale=1.0, empty_state=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    w = {
        "model": lambda: -torch.exp(-2 + 2 * random(n_embd)),
        "none": lambda: torch.zeros(n_embd),
        "strong": lambda: torch.full((n_embd,), -20.0),
        "total": lambda: torch.full((n_embd,), -1000.0),
    }[decay]()
    state = torch.stack(
        (random(batch, n_embd), 0.1 + random(batch, n_embd).abs(), random(batch, n_embd)), dim=1
    )
    if empty_state:
        state = torch.zeros_like(state)
        state[:, 2] = -1e38
    shape = (batch, n_tokens, n_embd)
    inputs = (w, random(n_embd), key_scale * random(*shape), random(*shape), state)
    return Problem(inputs, random(*shape), random(batch, 2, n_embd))


@pytest.fixture(scope="session")
def wkv7_problem() -> Callable[..., Problem]:
    return _wkv7


@pytest.fixture(scope="session")
def wkv4_problem() -> Callable[..., Problem]:
    return _wkv4
