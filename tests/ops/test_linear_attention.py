"""Every backend of wkv5 and wkv6, held to the float64 loop and to sums over pairs of tokens written out."""

import math

import pytest
import torch

from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.wkv5 import wkv5
from rwkv_train.ops.wkv6 import wkv6
from tests.ops.backends_here import backends_on_cpu

# Relative errors, of norms. About 10 roundings (3e-8 each) of wkv6 follow each other; more where nothing decays.
# A decay near 1 is rounded to 3e-8, in wkv5 the same way at every token: up to 3e-5 on what is a thousand tokens old.
FLOAT32 = {"wkv6": 2e-6, "wkv5": 2e-5}
FLOAT64 = 1e-12

NAMES = ("y", "final_state", "dr", "dw", "dk", "dv", "du", "dstate")

ops = pytest.mark.parametrize("op", ["wkv6", "wkv5"])
with_backends = pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in ("wkv6", "wkv5") for backend in backends_on_cpu(op)]
)

CASES = {
    "model-size": {"n_tokens": 75, "head_size": 64},
    "one-token": {"n_tokens": 1, "head_size": 64},
    "two-tokens": {"n_tokens": 2},
    "whole-chunks": {"n_tokens": 32},
    "one-more-than-whole-chunks": {"n_tokens": 33},
    "head-of-80": {"batch": 1, "n_tokens": 130, "n_head": 1, "head_size": 80},
    "odd-head": {"n_tokens": 40, "n_head": 1, "head_size": 20},
    "many-heads": {"batch": 1, "n_tokens": 9, "n_head": 27, "head_size": 5},
    "one-channel": {"n_tokens": 130, "head_size": 1},
    "no-decay": {"n_tokens": 70, "decay": "none"},
    "slow-decay": {"n_tokens": 130, "decay": "slow"},
    "strong-decay": {"n_tokens": 70, "head_size": 64, "decay": "strong"},
    "total-decay": {"n_tokens": 37, "decay": "total"},
    "mixed-decay": {"n_tokens": 70, "head_size": 20, "decay": "mixed"},
    "longer-than-a-segment": {"batch": 1, "n_tokens": 1050, "n_head": 1},
}


def table(cases):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def relative_error(found, expected):
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def results(operator, problem, backend, dtype):
    """y, the final state and the gradients of all inputs, the last through y and the final state."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in problem.inputs]
    y, final_state = operator.run(*inputs, PLAIN, backend=backend)
    loss = (y * problem.dy.to(dtype)).sum() + (final_state * problem.d_final.to(dtype)).sum()
    return [y.detach(), final_state.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(found, expected, bound):
    errors = {name: relative_error(x, y) for name, x, y in zip(NAMES, found, expected, strict=True)}
    assert max(errors.values()) < bound, errors


def written_out(r, w, k, v, u, state):
    """y and the final state as sums over pairs of tokens, each with its own product of decays; no state in between."""
    n_tokens = r.shape[1]
    total = torch.cat(
        (torch.zeros_like(w[:, :1]), w.cumsum(1)), dim=1
    )  # [B, T + 1, H, N]: decay up to a token
    between = total[:, :-1].unsqueeze(2) - total[:, 1:].unsqueeze(
        1
    )  # [B, t, s, H, N]: decays after s, before t
    earlier = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril(-1)[None, :, :, None, None]
    weights = torch.where(earlier, between, -torch.inf).exp()
    weights = weights + torch.eye(n_tokens, dtype=r.dtype)[None, :, :, None, None] * u
    y = torch.einsum("bthk,btshk,bshk,bshv->bthv", r, weights, k, v)
    y = y + torch.einsum("bthk,bhvk->bthv", r * total[:, :-1].exp(), state)
    to_end = (total[:, -1:] - total[:, 1:]).exp()
    final_state = torch.einsum("bthv,bthk->bhvk", v, k * to_end) + state * total[:, -1].exp().unsqueeze(-2)
    return y, final_state


# ---- the loop


@ops
def test_the_loop_equals_the_sums_written_out(operators, op):
    problem = operators[op].problem(n_tokens=19, head_size=5)
    inputs = [x.double() for x in problem.inputs]
    found = operators[op].run(*inputs, PLAIN, backend="reference")
    expected = written_out(inputs[0], inputs[1].expand(inputs[0].shape), *inputs[2:])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


@ops
def test_the_gradients_of_the_loop_equal_finite_differences(operators, op):
    problem = operators[op].problem(batch=1, n_tokens=4, n_head=2, head_size=3)
    inputs = [x.double().requires_grad_() for x in problem.inputs]
    assert torch.autograd.gradcheck(lambda *x: operators[op].run(*x, PLAIN, backend="reference"), inputs)


# ---- the other backends, against the float64 loop


@with_backends
@table(CASES)
def test_it_equals_the_float64_loop(operators, op, backend, case):
    problem = operators[op].problem(**case)
    expected = results(operators[op], problem, "reference", torch.float64)
    assert_close(results(operators[op], problem, backend, torch.float32), expected, FLOAT32[op])


@ops
@table({name: CASES[name] for name in ("model-size", "mixed-decay", "slow-decay", "longer-than-a-segment")})
def test_torch_in_float64_has_no_other_error_than_rounding(operators, op, case):
    problem = operators[op].problem(**case)
    expected = results(operators[op], problem, "reference", torch.float64)
    assert_close(results(operators[op], problem, "torch", torch.float64), expected, FLOAT64)


@pytest.mark.parametrize("backend", backends_on_cpu("wkv6"))
def test_the_gradient_of_a_strong_decay_is_no_difference_of_large_numbers(operators, backend):
    """It is 1e-7 of the gradients of r and k, whose difference would give it in exact arithmetic."""
    problem = operators["wkv6"].problem(n_tokens=70, decay="slow")
    w = problem.inputs[1]
    w[..., ::2] = -16.0
    expected = results(operators["wkv6"], problem, "reference", torch.float64)
    found = results(operators["wkv6"], problem, backend, torch.float32)
    dw = NAMES.index("dw")
    assert relative_error(found[dw][..., ::2], expected[dw][..., ::2]) < FLOAT32["wkv6"]


# ---- against what is known from elsewhere


@with_backends
def test_without_decay_it_is_linear_attention_with_a_bonus(operators, op, backend):
    r, w, k, v, u, _ = operators[op].problem(n_tokens=37).inputs
    y, _ = operators[op].run(r, 0 * w, k, v, u, None, PLAIN, backend=backend)

    earlier = torch.einsum("bthn,bshn->bhts", r, k).tril(-1)
    itself = torch.einsum("bthn,hn,bthn->bth", r, u, k)
    expected = torch.einsum("bhts,bshn->bthn", earlier, v) + itself.unsqueeze(-1) * v
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@with_backends
def test_with_total_decay_a_token_reads_itself_and_the_one_before(operators, op, backend):
    r, w, k, v, u, _ = operators[op].problem(n_tokens=37, decay="total").inputs
    y, final_state = operators[op].run(r, w, k, v, u, None, PLAIN, backend=backend)

    expected = (r * u * k).sum(-1, keepdim=True) * v
    expected[:, 1:] += (r[:, 1:] * k[:, :-1]).sum(-1, keepdim=True) * v[:, :-1]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final_state, v[:, -1].unsqueeze(-1) * k[:, -1].unsqueeze(-2))


@pytest.mark.parametrize("backend", backends_on_cpu("wkv5"))
def test_wkv5_is_wkv6_with_one_decay_for_all_tokens(wkv5_problem, backend):
    r, w, k, v, u, state = wkv5_problem(n_tokens=75).inputs
    found = wkv5(r, w, k, v, u, state, PLAIN, backend=backend)
    expected = wkv6(r, w.expand(r.shape), k, v, u, state, PLAIN, backend=backend)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@with_backends
def test_the_oldest_value_is_weighted_by_all_decays_between(operators, op, backend):
    n_tokens, decay = 41, 0.9
    one = torch.ones(1, n_tokens, 1, 1)
    w = torch.full((1, 1) if op == "wkv5" else one.shape, math.log(decay))
    v = torch.zeros_like(one)
    v[:, 0] = 1.0
    y, _ = operators[op].run(one, w, one, v, torch.full((1, 1), 3.0), None, PLAIN, backend=backend)
    expected = torch.tensor([3.0, *(decay**age for age in range(n_tokens - 1))])
    torch.testing.assert_close(y.flatten(), expected)
