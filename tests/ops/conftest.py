"""Inputs for the recurrences, from a seeded generator."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.ops.wkv4 import wkv4, wkv4_zero_state
from rwkv_train.ops.wkv5 import wkv5, wkv5_zero_state
from rwkv_train.ops.wkv6 import wkv6, wkv6_zero_state
from rwkv_train.ops.wkv7 import wkv7, wkv7_zero_state


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


def _wkv6(batch=2, n_tokens=21, n_head=2, head_size=8, decay="model", static=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    shape, by_head = (batch, n_tokens, n_head, head_size), (n_head, head_size)
    w_shape = by_head if static else shape
    w = {
        "model": lambda: (
            -torch.exp(10 * torch.rand(w_shape, generator=generator) - 8)
        ),  # raw decay of -8 to 2
        "slow": lambda: torch.full(w_shape, -math.exp(-8)),
        "none": lambda: torch.zeros(w_shape),
        "strong": lambda: torch.full(w_shape, -math.exp(5)),
        "total": lambda: torch.full(w_shape, -1000.0),
        "mixed": lambda: -torch.exp(3 * random(*w_shape)),  # from 1e-4 to 1e4
    }[decay]()
    state_shape = (batch, n_head, head_size, head_size)
    inputs = (random(*shape), w, 0.5 * random(*shape), random(*shape), random(*by_head), random(*state_shape))
    return Problem(inputs, random(*shape), random(*state_shape))


def _wkv5(**options):
    return _wkv6(**options, static=True)


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


class Operator(NamedTuple):
    """A recurrence as the tests that hold for all of them see it."""

    run: Callable[..., tuple[Tensor, Tensor]]
    problem: Callable[..., Problem]
    zero_state: Callable[[], Tensor]
    """The state before a text, for a problem of the usual size."""
    full_precision: tuple[int, ...]
    """Inputs that stay float32 where the rest is bfloat16: the log decay and the state."""
    shared: tuple[int, ...] = ()
    """Inputs that have no row for each token."""

    def packed_problem(self, lengths: Sequence[int], **options) -> Problem:
        """Inputs of one row that holds sequences of these lengths, each with a state of its own."""
        row = self.problem(batch=1, n_tokens=sum(lengths), **options)
        states = self.problem(batch=len(lengths), n_tokens=1, **options)
        return Problem((*row.inputs[:-1], states.inputs[-1]), row.dy, states.d_final)

    def of_sequence(self, problem: Problem, s: int, tokens: slice) -> Problem:
        """Inputs of one sequence of a packed problem, as those of a plain batch of one."""
        *inputs, state = problem.inputs
        cut = [x if i in self.shared else x[:, tokens] for i, x in enumerate(inputs)]
        return Problem((*cut, state[s : s + 1]), problem.dy[:, tokens], problem.d_final[s : s + 1])


OPERATORS = {
    "wkv7": Operator(wkv7, _wkv7, lambda: wkv7_zero_state(2, 2, 8), (1, 6)),
    "wkv6": Operator(wkv6, _wkv6, lambda: wkv6_zero_state(2, 2, 8), (1, 5), (4,)),
    "wkv5": Operator(wkv5, _wkv5, lambda: wkv5_zero_state(2, 2, 8), (1, 5), (1, 4)),
    "wkv4": Operator(wkv4, _wkv4, lambda: wkv4_zero_state(2, 6), (0, 4), (0, 1)),
}


@pytest.fixture(scope="session")
def operators() -> dict[str, Operator]:
    return OPERATORS


@pytest.fixture(scope="session")
def wkv7_problem() -> Callable[..., Problem]:
    return _wkv7


@pytest.fixture(scope="session")
def wkv6_problem() -> Callable[..., Problem]:
    return _wkv6


@pytest.fixture(scope="session")
def wkv5_problem() -> Callable[..., Problem]:
    return _wkv5


@pytest.fixture(scope="session")
def wkv4_problem() -> Callable[..., Problem]:
    return _wkv4
