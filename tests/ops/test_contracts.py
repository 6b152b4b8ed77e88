"""What every operator promises with every backend, whatever it computes."""

import pytest
import torch

from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.prepare import OPERATORS
from tests.ops.backends_here import backends_on_cpu

# Outputs and gradients are rounded to bfloat16 (1.7e-3); what is inside is float32.
BFLOAT16 = 4e-3
# As for the least exact of the operators, wkv4: see test_recurrences.py.
FLOAT32 = 3e-5

ops = pytest.mark.parametrize("op", list(OPERATORS))
with_backends = pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPERATORS for backend in backends_on_cpu(op)]
)
MATRIX_STATES = pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])


def relative_error(found, expected):
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def results(operator, inputs, dy, backend):
    """y, the final state and the gradients of all inputs, through y."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, final_state = operator.run(*leaves, PLAIN, backend=backend)
    return [y.detach(), final_state.detach(), *torch.autograd.grad((y * dy.to(y)).sum(), leaves)]


@with_backends
def test_bfloat16_inputs_are_computed_in_float32(operators, op, backend):
    """Log decay and state stay float32, as the models pass them."""
    operator = operators[op]
    problem = operator.problem(n_tokens=75)
    full = operator.full_precision
    mixed = [x if i in full else x.bfloat16() for i, x in enumerate(problem.inputs)]

    found = results(operator, mixed, problem.dy, backend)
    expected = results(operator, [x.double() for x in mixed], problem.dy, "reference")

    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *(x.dtype for x in mixed)]
    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < BFLOAT16, errors


@with_backends
def test_every_input_may_be_bfloat16_but_the_state(operators, op, backend):
    operator = operators[op]
    problem = operator.problem(n_tokens=40)
    rounded = [*(x.bfloat16() for x in problem.inputs[:-1]), problem.inputs[-1]]

    found = results(operator, rounded, problem.dy, backend)
    expected = results(operator, [x.double() for x in rounded], problem.dy, "reference")

    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *(x.dtype for x in rounded)]
    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < BFLOAT16, errors


@with_backends
def test_the_same_call_gives_the_same_bits(operators, op, backend):
    operator = operators[op]
    problem = operator.problem(n_tokens=75)
    first = results(operator, problem.inputs, problem.dy, backend)
    again = results(operator, problem.inputs, problem.dy, backend)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@ops
def test_the_number_of_threads_changes_no_bit_of_cpp(operators, op):
    operator = operators[op]
    size = {"n_embd": 200} if op == "wkv4" else {"n_head": 5}
    problem = operator.problem(batch=3, n_tokens=40, **size)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(operator, problem.inputs, problem.dy, "cpp")
        torch.set_num_threads(3)
        three = results(operator, problem.inputs, problem.dy, "cpp")
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


@with_backends
def test_views_with_gaps_are_read_as_what_they_show(operators, op, backend):
    operator = operators[op]
    problem = operator.problem()
    expected = results(operator, problem.inputs, problem.dy, backend)
    views = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in problem.inputs]
    assert not views[0].is_contiguous()
    found = results(operator, views, problem.dy, backend)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@with_backends
@pytest.mark.parametrize("output", [0, 1], ids=["y", "final-state"])
def test_a_gradient_through_one_output_alone_is_right(operators, op, backend, output):
    operator = operators[op]
    problem = operator.problem()

    def gradient(name, dtype):
        k = problem.inputs[2].to(dtype).requires_grad_()
        inputs = [x.to(dtype) for x in problem.inputs]
        outputs = operator.run(*inputs[:2], k, *inputs[3:], PLAIN, backend=name)
        (dk,) = torch.autograd.grad(outputs[output][:, :2].sum(), k)
        return dk

    assert relative_error(gradient(backend, torch.float32), gradient("reference", torch.float64)) < FLOAT32


@with_backends
def test_a_nan_is_not_hidden(operators, op, backend):
    operator = operators[op]
    problem = operator.problem()
    for i, x in enumerate(problem.inputs):
        inputs = list(problem.inputs)
        inputs[i] = x.clone()
        inputs[i].view(-1)[0] = torch.nan
        y, _ = operator.run(*inputs, PLAIN, backend=backend)
        assert y.isnan().any(), i


@with_backends
def test_no_tokens_leave_the_state_as_it_is(operators, op, backend):
    problem = operators[op].problem(n_tokens=0)
    y, final_state = operators[op].run(*problem.inputs, PLAIN, backend=backend)
    assert y.shape == problem.dy.shape
    assert torch.equal(final_state, problem.inputs[-1])


@with_backends
def test_no_state_means_the_state_before_a_text(operators, op, backend):
    operator = operators[op]
    *inputs, _ = operator.problem().inputs
    without = operator.run(*inputs, None, PLAIN, backend=backend)
    given = operator.run(*inputs, operator.zero_state(), PLAIN, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(without, given, strict=True))


@with_backends
@pytest.mark.parametrize("split", [1, 8, 17, 32, 40])
def test_the_state_carries_everything_across_a_split(operators, op, backend, split):
    operator = operators[op]
    problem = operator.problem(n_tokens=41)
    *inputs, start = problem.inputs
    by_token = [x.shape == problem.dy.shape for x in inputs]

    def run(tokens, state):
        piece = [x[:, tokens] if cut else x for x, cut in zip(inputs, by_token, strict=True)]
        return operator.run(*piece, state, PLAIN, backend=backend)

    whole, final = run(slice(None), start)
    head, middle = run(slice(split), start)
    tail, end = run(slice(split, None), middle)

    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end, final, atol=1e-5, rtol=1e-5)


@MATRIX_STATES
@pytest.mark.parametrize("wrong", [torch.zeros(2, 2, 8, 7), torch.zeros(2, 2, 8, 8, dtype=torch.bfloat16)])
def test_a_state_of_another_shape_or_dtype_is_refused(operators, op, wrong):
    *inputs, _ = operators[op].problem().inputs
    with pytest.raises(ValueError, match=r"state must be torch\.float32 of shape"):
        operators[op].run(*inputs, wrong, PLAIN)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2, 6), torch.zeros(2, 3, 6, dtype=torch.float64)])
def test_wkv4_refuses_a_state_of_another_shape_or_dtype(operators, wrong):
    *inputs, _ = operators["wkv4"].problem().inputs
    with pytest.raises(ValueError, match=r"state must be torch\.float32 of shape"):
        operators["wkv4"].run(*inputs, wrong, PLAIN)


def replaced(inputs, index, x):
    return [*inputs[:index], x, *inputs[index + 1 :]]


def test_wkv7_names_the_shapes_that_disagree(operators):
    inputs = operators["wkv7"].problem().inputs
    with pytest.raises(ValueError, match=r"one shape .* \(2, 20, 2, 8\)"):
        operators["wkv7"].run(*replaced(inputs, 2, inputs[2][:, :20]), PLAIN)


@pytest.mark.parametrize("index", [1, 2, 3], ids=["w", "k", "v"])
def test_wkv6_names_the_shapes_that_disagree(operators, index):
    inputs = operators["wkv6"].problem().inputs
    with pytest.raises(ValueError, match=r"u \[H, N\], got .*\(2, 20, 2, 8\)"):
        operators["wkv6"].run(*replaced(inputs, index, inputs[index][:, :20]), PLAIN)


@pytest.mark.parametrize(("op", "index"), [("wkv5", 1), ("wkv5", 4), ("wkv6", 4)], ids=["5-w", "5-u", "6-u"])
def test_a_decay_or_bonus_of_another_shape_is_refused(operators, op, index):
    inputs = operators[op].problem().inputs
    with pytest.raises(ValueError, match=r"u \[H, N\], got .*\(2, 7\)"):
        operators[op].run(*replaced(inputs, index, torch.zeros(2, 7)), PLAIN)


@pytest.mark.parametrize("index", [2, 3], ids=["k", "v"])
def test_wkv5_names_the_shapes_that_disagree(operators, index):
    inputs = operators["wkv5"].problem().inputs
    with pytest.raises(ValueError, match=r"w and u \[H, N\], got .*\(2, 20, 2, 8\)"):
        operators["wkv5"].run(*replaced(inputs, index, inputs[index][:, :20]), PLAIN)


def test_wkv4_names_the_shapes_that_disagree(operators):
    inputs = operators["wkv4"].problem().inputs
    with pytest.raises(ValueError, match=r"w and u must be \[C\].*\(5,\)"):
        operators["wkv4"].run(*replaced(inputs, 1, inputs[1][:5]), PLAIN)
