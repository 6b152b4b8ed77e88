"""Every backend of wkv7 and wkv4, held to the float64 loop and to what is known from elsewhere.

wkv5 and wkv6 are in ``test_linear_attention.py``; what holds for all operators is in ``test_contracts.py``.
"""

import pytest
import torch

from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7
from tests.ops.backends_here import backends_on_cpu

# Relative errors, of norms. Rounding float32 once costs 3e-8; about 10 such roundings follow each other in wkv7.
WKV7_FLOAT32 = 1e-6
# The log scale of wkv4 is rounded at every token and stands in an exponent: 1e-5 after a thousand tokens.
WKV4_FLOAT32 = 3e-5
# The same with keys of 30 and 100: an exponent of that size is rounded to 2e-6 to 8e-6, at every token.
WKV4_FLOAT32_LARGE_KEYS = 2e-3
FLOAT64 = 1e-12

WKV7_NAMES = ("y", "final_state", "dr", "dw", "dk", "dv", "da", "db", "dstate")
WKV4_NAMES = ("y", "final_sums", "dw", "du", "dk", "dv", "dstate")

wkv7_backends = pytest.mark.parametrize("backend", backends_on_cpu("wkv7"))
wkv4_backends = pytest.mark.parametrize("backend", backends_on_cpu("wkv4"))

WKV7_CASES = {
    "model-size": {"n_tokens": 75, "head_size": 64},
    "one-token": {"n_tokens": 1, "head_size": 64},
    "two-tokens": {"n_tokens": 2},
    "whole-chunks": {"n_tokens": 32},
    "one-more-than-whole-chunks": {"n_tokens": 33},
    "odd-head": {"n_tokens": 40, "n_head": 1, "head_size": 20},
    "many-heads": {"batch": 1, "n_tokens": 9, "n_head": 27, "head_size": 5},
    "one-channel": {"n_tokens": 19, "head_size": 1},
    "no-decay": {"n_tokens": 70, "decay": "none"},
    "strong-decay": {"n_tokens": 70, "head_size": 64, "decay": "strong"},
    "total-decay": {"n_tokens": 37, "decay": "total"},
    "mixed-decay": {"n_tokens": 70, "head_size": 20, "decay": "mixed"},
    "longer-than-a-segment": {"batch": 1, "n_tokens": 1050, "n_head": 1},
}
WKV4_CASES = {
    "model-size": {"n_tokens": 75, "n_embd": 70},
    "one-token": {"n_tokens": 1, "n_embd": 64},
    "two-tokens": {"n_tokens": 2},
    "whole-intervals": {"n_tokens": 64, "n_embd": 128},
    "one-more-than-whole-intervals": {"n_tokens": 65},
    "empty-state": {"n_tokens": 40, "empty_state": True},
    "one-channel": {"n_tokens": 19, "n_embd": 1},
    "no-decay": {"n_tokens": 70, "decay": "none"},
    "strong-decay": {"n_tokens": 70, "decay": "strong"},
    "total-decay": {"n_tokens": 37, "decay": "total", "empty_state": True},
    "long": {"batch": 1, "n_tokens": 1050},
}
WKV4_LARGE_KEYS = {
    "keys-of-30": {"n_tokens": 120, "key_scale": 30.0, "empty_state": True},
    "keys-of-100": {"n_tokens": 50, "key_scale": 100.0},
}


def table(cases):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def relative_error(found, expected):
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def wkv7_results(problem, backend, dtype):
    """y, the final state and the gradients of all inputs, the last through y and the final state."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in problem.inputs]
    y, final_state = wkv7(*inputs, PLAIN, backend=backend)
    loss = (y * problem.dy.to(dtype)).sum() + (final_state * problem.d_final.to(dtype)).sum()
    return [y.detach(), final_state.detach(), *torch.autograd.grad(loss, inputs)]


def wkv4_results(problem, backend, dtype, log_scale):
    """The same; of the final state A and B, divided by exp(log_scale), because its own scale is arbitrary."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in problem.inputs]
    y, final_state = wkv4(*inputs, PLAIN, backend=backend)
    scale = (final_state[:, 2:].detach().double() - log_scale).exp()
    sums = final_state[:, :2] * scale.to(dtype)
    loss = (y * problem.dy.to(dtype)).sum() + (sums * problem.d_final.to(dtype)).sum()
    return [y.detach(), sums.detach(), *torch.autograd.grad(loss, inputs)]


def final_log_scale(problem):
    inputs = [x.double() for x in problem.inputs]
    return wkv4(*inputs, PLAIN, backend="reference")[1][:, 2:]


def assert_close(names, found, expected, bound):
    errors = {name: relative_error(x, y) for name, x, y in zip(names, found, expected, strict=True)}
    assert max(errors.values()) < bound, errors


# ---- against the float64 loop


@wkv7_backends
@table(WKV7_CASES)
def test_wkv7_equals_the_float64_loop(wkv7_problem, backend, case):
    problem = wkv7_problem(**case)
    expected = wkv7_results(problem, "reference", torch.float64)
    assert_close(WKV7_NAMES, wkv7_results(problem, backend, torch.float32), expected, WKV7_FLOAT32)


@wkv4_backends
@table(WKV4_CASES)
def test_wkv4_equals_the_float64_loop(wkv4_problem, backend, case):
    problem = wkv4_problem(**case)
    log_scale = final_log_scale(problem)
    expected = wkv4_results(problem, "reference", torch.float64, log_scale)
    found = wkv4_results(problem, backend, torch.float32, log_scale)
    assert_close(WKV4_NAMES, found, expected, WKV4_FLOAT32)


@wkv4_backends
@table(WKV4_LARGE_KEYS)
def test_wkv4_survives_large_keys(wkv4_problem, backend, case):
    problem = wkv4_problem(**case)
    log_scale = final_log_scale(problem)
    expected = wkv4_results(problem, "reference", torch.float64, log_scale)
    found = wkv4_results(problem, backend, torch.float32, log_scale)
    assert_close(WKV4_NAMES, found, expected, WKV4_FLOAT32_LARGE_KEYS)


@table({name: WKV7_CASES[name] for name in ("model-size", "mixed-decay", "longer-than-a-segment")})
def test_wkv7_torch_in_float64_has_no_other_error_than_rounding(wkv7_problem, case):
    problem = wkv7_problem(**case)
    expected = wkv7_results(problem, "reference", torch.float64)
    assert_close(WKV7_NAMES, wkv7_results(problem, "torch", torch.float64), expected, FLOAT64)


@table({**WKV4_LARGE_KEYS, "long": WKV4_CASES["long"]})
def test_wkv4_torch_in_float64_has_no_other_error_than_rounding(wkv4_problem, case):
    problem = wkv4_problem(**case)
    log_scale = final_log_scale(problem)
    expected = wkv4_results(problem, "reference", torch.float64, log_scale)
    found = wkv4_results(problem, "torch", torch.float64, log_scale)
    assert_close(WKV4_NAMES, found, expected, FLOAT64)


# ---- against what is known from elsewhere


def test_the_gradients_of_the_wkv7_loop_equal_finite_differences(wkv7_problem):
    problem = wkv7_problem(batch=1, n_tokens=4, n_head=2, head_size=3)
    inputs = [x.double().requires_grad_() for x in problem.inputs]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, PLAIN, backend="reference"), inputs)


def test_the_gradients_of_the_wkv4_loop_equal_finite_differences(wkv4_problem):
    problem = wkv4_problem(batch=2, n_tokens=4, n_embd=3)
    inputs = [x.double().requires_grad_() for x in problem.inputs]

    def y_and_final_sums(*x):
        y, final_state = wkv4(*x, PLAIN, backend="reference")
        # A second piece of text reads the state: the only use of it in which its gradient is promised.
        again, _ = wkv4(*x[:4], final_state, PLAIN, backend="reference")
        return y, again

    assert torch.autograd.gradcheck(y_and_final_sums, inputs)


@wkv7_backends
def test_without_decay_or_removal_wkv7_is_linear_attention(wkv7_problem, backend):
    r, w, k, v, a, b, _ = wkv7_problem(n_tokens=37).inputs
    y, _ = wkv7(r, 0 * w, k, v, 0 * a, 0 * b, None, PLAIN, backend=backend)

    scores = torch.einsum("bthn,bshn->bhts", r, k).tril()
    torch.testing.assert_close(y, torch.einsum("bhts,bshn->bthn", scores, v), atol=1e-4, rtol=1e-4)


@wkv7_backends
def test_removing_a_key_makes_room_for_its_new_value(wkv7_problem, backend):
    _, w, _, v, a, _, state = wkv7_problem(n_tokens=37).inputs
    key = -a  # of length 1
    y, _ = wkv7(key, 0 * w, key, v, a, key, state, PLAIN, backend=backend)  # reads with the key just written

    torch.testing.assert_close(y, v, atol=1e-4, rtol=1e-4)


@wkv4_backends
def test_wkv4_is_a_mean_weighted_by_key_and_age(wkv4_problem, backend):
    w, u, k, v, _ = wkv4_problem(n_tokens=23).inputs
    y, _ = wkv4(w, u, k, v, None, PLAIN, backend=backend)

    n_tokens = k.shape[1]
    age = torch.arange(n_tokens).unsqueeze(1) - torch.arange(n_tokens) - 1  # [t, s]; 0 for the token before
    log_weights = age.unsqueeze(-1) * w + k.unsqueeze(1)  # [B, t, s, C]
    itself = torch.eye(n_tokens, dtype=torch.bool).unsqueeze(-1)
    log_weights = torch.where(itself, u + k.unsqueeze(1), log_weights)
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1).unsqueeze(-1)
    weights = log_weights.masked_fill(future, -torch.inf).softmax(dim=2)
    torch.testing.assert_close(y, torch.einsum("btsc,bsc->btc", weights, v))
