"""Packed rows in every operator and backend: each sequence as if it were alone, from its own state."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops.context import PLAIN, SequenceContext, packed_context
from rwkv_train.ops.prepare import OPERATORS
from tests.ops.backends_here import backends_on_cpu

# Relative errors of norms in float32, as for plain batches: see test_recurrences.py and test_linear_attention.py.
# A decay of wkv5 near 1 is rounded the same way at each of a thousand tokens.
FLOAT32 = {"wkv7": 1e-6, "wkv6": 2e-6, "wkv5": 4e-5, "wkv4": 3e-5}
FLOAT64 = 1e-12
# Sums over sequences are rounded once to bfloat16, which is 1.7e-3, and not at each of them.
BFLOAT16_ONCE = 2.2e-3

LENGTHS = {
    "around-chunks": [15, 16, 17, 31, 32, 33, 7, 8, 9, 65],
    "empty-and-single-tokens": [0, 0, 1, 0, 40, 1, 1, 2, 0],
    "nothing-but-single-tokens": [1] * 9,
    "one-sequence": [75],
    "longer-than-a-segment": [3, 1050, 0, 20],
}

ops = pytest.mark.parametrize("op", list(OPERATORS))
with_backends = pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPERATORS for backend in backends_on_cpu(op)]
)
fast_backends = pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPERATORS for backend in ("cpp", "torch")]
)
table = pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def slices(lengths):
    bounds = boundaries(lengths).tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def relative_error(found, expected):
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def results(op, run, problem, context, backend, dtype, log_scale=None):
    """y, the final state and the gradients of all inputs through both, in the dtypes of the inputs if dtype is None.

    Of wkv4's final state the sums divided by exp(log_scale), because its own scale is arbitrary.
    """

    def cast(x):
        return x if dtype is None else x.to(dtype)

    inputs = [cast(x.detach()).requires_grad_() for x in problem.inputs]
    y, final = run(*inputs, context, backend=backend)
    if op == "wkv4":
        scale = final[:, 2:].detach().double()
        final = final[:, :2] * (scale - log_scale).exp().to(final.dtype)
    loss = (y * cast(problem.dy)).sum() + (final * cast(problem.d_final)).sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def alone(operator, op, problem, lengths):
    """The same for a packed problem whose sequences are run one by one by the float64 loop on plain batches.

    Returns them, and the log scales of wkv4's final states.
    """
    n_inputs = len(problem.inputs)
    total = [torch.zeros_like(x, dtype=torch.float64) for x in (problem.dy, problem.d_final, *problem.inputs)]
    log_scales = []
    for s, tokens in enumerate(slices(lengths)):
        one = operator.of_sequence(problem, s, tokens)
        inputs = [x.double() for x in one.inputs]
        log_scale = operator.run(*inputs, PLAIN, backend="reference")[1][:, 2:] if op == "wkv4" else None
        log_scales.append(log_scale)
        y, final, *gradients = results(op, operator.run, one, PLAIN, "reference", torch.float64, log_scale)
        total[0][:, tokens], total[1][s] = y, final[0]
        for i, gradient in enumerate(gradients):
            if i in operator.shared:
                total[2 + i] += gradient
            elif i == n_inputs - 1:
                total[2 + i][s] = gradient[0]
            else:
                total[2 + i][:, tokens] = gradient
    return total, torch.cat(log_scales) if op == "wkv4" else None


def assert_equal_to_alone(operator, op, backend, lengths, dtype, bound):
    problem = operator.packed_problem(lengths)
    expected, log_scale = alone(operator, op, problem, lengths)
    context = packed_context(boundaries(lengths))
    found = results(op, operator.run, problem, context, backend, dtype, log_scale)
    assert [x.shape for x in found] == [x.shape for x in expected]
    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < bound, errors


# ---- each sequence as if it were alone


@table
@fast_backends
def test_a_packed_row_equals_its_sequences_alone(operators, op, backend, lengths):
    assert_equal_to_alone(operators[op], op, backend, lengths, torch.float32, FLOAT32[op])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["around-chunks", "empty-and-single-tokens"])
@ops
def test_in_float64_it_does_so_up_to_rounding(operators, op, backend, name):
    assert_equal_to_alone(operators[op], op, backend, LENGTHS[name], torch.float64, FLOAT64)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=7).filter(any))
@ops
def test_it_does_so_whatever_the_lengths(operators, op, lengths):
    assert_equal_to_alone(operators[op], op, "cpp", lengths, torch.float32, FLOAT32[op])


@with_backends
def test_one_sequence_gives_the_bits_of_a_plain_batch_of_one(operators, op, backend):
    problem, context = operators[op].packed_problem([40]), packed_context(boundaries([40]))
    scale = torch.zeros(1, 1, 1, dtype=torch.float64)
    packed, plain = (
        results(op, operators[op].run, problem, kind, backend, torch.float32, scale)
        for kind in (context, PLAIN)
    )
    assert all(torch.equal(x, y) for x, y in zip(packed, plain, strict=True))


@with_backends
def test_a_sequence_sees_nothing_of_the_one_before_it(operators, op, backend):
    lengths, context = [33, 20], packed_context(boundaries([33, 20]))
    operator = operators[op]
    problem = operator.packed_problem(lengths)
    changed = [x.clone() for x in problem.inputs]
    for i, x in enumerate(changed[:-1]):
        if i not in operator.shared:
            x[:, :33] *= 0.5
    before = operator.run(*problem.inputs, context, backend=backend)
    after = operator.run(*changed, context, backend=backend)
    assert torch.equal(before[0][:, 33:], after[0][:, 33:])
    assert torch.equal(before[1][1], after[1][1])
    assert not torch.equal(before[0][:, :33], after[0][:, :33])


@with_backends
def test_an_empty_sequence_hands_its_state_and_its_gradient_on(operators, op, backend):
    operator = operators[op]
    problem = operator.packed_problem([3, 0, 2, 0])
    *inputs, state = problem.inputs
    state = state.clone().requires_grad_()
    _, final = operator.run(*inputs, state, packed_context(boundaries([3, 0, 2, 0])), backend=backend)
    d_final = torch.rand(final.shape, generator=torch.Generator().manual_seed(1))
    (d_state,) = torch.autograd.grad(final, state, d_final)
    for s in (1, 3):
        assert torch.equal(final[s], state[s])
        assert torch.equal(d_state[s], d_final[s])


@with_backends
def test_no_state_means_one_before_a_text_for_each_sequence(operators, op, backend):
    operator = operators[op]
    *inputs, _ = operator.packed_problem([5, 9]).inputs
    context, zero = packed_context(boundaries([5, 9])), operator.zero_state()  # of two sequences
    without = operator.run(*inputs, None, context, backend=backend)
    given = operator.run(*inputs, zero, context, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(without, given, strict=True))


@pytest.mark.parametrize("n_threads", [2, 3, 16])
@ops
def test_the_number_of_threads_changes_no_bit_of_cpp(operators, op, n_threads):
    lengths = [1, 0, 150, 2, 40, 0, 5]
    operator, context = operators[op], packed_context(boundaries(lengths))
    problem = operator.packed_problem(lengths, **({"n_embd": 200} if op == "wkv4" else {"n_head": 5}))
    scale = torch.zeros(len(lengths), 1, 1, dtype=torch.float64)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(op, operator.run, problem, context, "cpp", torch.float32, scale)
        torch.set_num_threads(n_threads)
        many = results(op, operator.run, problem, context, "cpp", torch.float32, scale)
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(x, y) for x, y in zip(one, many, strict=True))


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in ("wkv4", "wkv5", "wkv6") for backend in ("cpp", "torch")]
)
def test_what_all_sequences_share_gets_a_sum_that_is_rounded_once(operators, op, backend):
    lengths = [2] * 40
    operator = operators[op]
    problem = operator.packed_problem(lengths)
    rounded = [*(x.bfloat16() for x in problem.inputs[:-1]), problem.inputs[-1]]
    dy = problem.dy.bfloat16()
    exact = type(problem)(tuple(x.double() for x in rounded), dy.double(), 0 * problem.d_final)
    expected, _ = alone(operator, op, exact, lengths)

    leaves = [x.detach().requires_grad_() for x in rounded]
    y, _ = operator.run(*leaves, packed_context(boundaries(lengths)), backend=backend)
    gradients = torch.autograd.grad(y, leaves, dy)

    for i in operator.shared:
        assert gradients[i].dtype == torch.bfloat16
        assert relative_error(gradients[i], expected[2 + i]) < BFLOAT16_ONCE


# ---- compiled


@fast_backends
def test_other_boundaries_are_no_other_graph(operators, op, backend):
    torch.compiler.reset()
    operator = operators[op]
    *inputs, state = operator.packed_problem([30, 5, 5]).inputs
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda context: operator.run(*inputs, state, context, backend=backend), fullgraph=True, backend=count
    )
    for lengths in ([30, 5, 5], [1, 0, 39], [13, 13, 14]):
        context = packed_context(boundaries(lengths))
        expected = operator.run(*inputs, state, context, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(compiled(context), expected, strict=True))
    assert len(graphs) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("cu_seqlens", "said"),
    [
        (torch.tensor([0, 5], dtype=torch.int32), r"torch\.int64 of shape \[S \+ 1\], got torch\.int32"),
        (torch.tensor([0]), r"got torch\.int64 of shape \(1,\)"),
        (torch.tensor([[0, 5]]), r"of shape \(1, 2\)"),
        (torch.tensor([1, 5]), "must go from 0 to 5, got 1 to 5"),
        (torch.tensor([0, 5, 3, 8]), "must not fall, got 5 and then 3 at sequence 1"),
    ],
    ids=["dtype", "too-short", "matrix", "not-from-0", "falling"],
)
def test_boundaries_that_cannot_be_are_refused(cu_seqlens, said):
    with pytest.raises(ValueError, match=said):
        packed_context(cu_seqlens)


@with_backends
@pytest.mark.parametrize("bounds", [[0, 5, 9], [0, 5, 11], [0, 12, 10], [1, 5, 10]], ids=str)
def test_boundaries_that_do_not_fit_the_tokens_are_refused(operators, op, backend, bounds):
    *inputs, state = operators[op].packed_problem([5, 5]).inputs
    context = SequenceContext(torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"cu_seqlens must (go from 0 to 10, got|not fall)"):
        operators[op].run(*inputs, state, context, backend=backend)


@ops
def test_several_rows_are_no_packed_batch(operators, op):
    problem = operators[op].problem()
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        operators[op].run(*problem.inputs, packed_context(torch.tensor([0, 21])))


@ops
def test_a_state_for_another_number_of_sequences_is_refused(operators, op):
    problem = operators[op].packed_problem([5, 5])
    with pytest.raises(ValueError, match=r"of shape \(3, .*got torch\.float32 of shape \(2, "):
        operators[op].run(*problem.inputs, packed_context(torch.tensor([0, 5, 5, 10])))
