"""What PyTorch asks of an operator: shape rules, compilation, autocast, and no silent second derivative."""

import pytest
import torch

from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.ops.prepare import OPERATORS

COMPILED = [f"{op}_{backend}" for op in OPERATORS for backend in ("cpp", "torch")]
NAMES = pytest.mark.parametrize("name", COMPILED)
PACKED = pytest.mark.parametrize("lengths", [None, [20, 0, 1, 34]], ids=["plain", "packed"])


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()  # PyTorch refuses to compile one function for too many kinds of arguments


@pytest.fixture
def call(operators):
    """Return (function of the tensors, fresh inputs that want gradients, cu_seqlens) for an operator's name."""

    def of(name, lengths=None):
        op, backend = name.split("_")
        problem = operators[op].packed_problem(lengths) if lengths else operators[op].problem()
        context = packed_context(torch.tensor([0, *lengths]).cumsum(0)) if lengths else PLAIN
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        return (
            (lambda *x: operators[op].run(*x, context, backend=backend)),
            inputs,
            context.cu_seqlens,
        )

    return of


def loss(outputs):
    y, final_state = outputs
    return y.square().sum() + final_state[:, :2].square().sum()


@NAMES
@pytest.mark.parametrize("keep_checkpoints", [True, False])
@PACKED
def test_the_forward_operator_passes_opcheck(call, name, lengths, keep_checkpoints):
    _, inputs, cu_seqlens = call(name, lengths)
    if not keep_checkpoints:  # without them there is no backward pass to check
        inputs = [x.detach() for x in inputs]
    operator = getattr(torch.ops.rwkv_train, name).default
    torch.library.opcheck(operator, (*inputs, cu_seqlens, keep_checkpoints))


@NAMES
@PACKED
def test_the_backward_operator_passes_opcheck(call, name, lengths):
    _, inputs, cu_seqlens = call(name, lengths)
    inputs = [x.detach() for x in inputs]
    y, final_state, checkpoints = getattr(torch.ops.rwkv_train, name)(*inputs, cu_seqlens, True)
    operator = getattr(torch.ops.rwkv_train, f"{name}_backward").default
    torch.library.opcheck(operator, (*inputs[:-1], cu_seqlens, checkpoints, y, final_state))


@NAMES
@PACKED
def test_compiled_as_one_graph_it_gives_the_same_bits(call, name, lengths):
    function, inputs, _ = call(name, lengths)
    expected = torch.autograd.grad(loss(function(*inputs)), inputs)
    # Not inductor: it compiles C++ for many seconds, of the sums around the operator.
    compiled = torch.compile(lambda *x: loss(function(*x)), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", list(OPERATORS))
def test_compiled_with_auto_it_is_still_one_graph(operators, op):
    run, inputs = operators[op].run, operators[op].problem().inputs
    compiled = torch.compile(lambda *x: run(*x, PLAIN)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run(*inputs, PLAIN, backend="cpp")[0])


@NAMES
def test_a_second_derivative_is_refused(call, name):
    function, inputs, _ = call(name)
    first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name} has no second derivative"):
        torch.autograd.grad(first[0].sum(), inputs)


@NAMES
def test_autocast_changes_nothing(call, name):
    function, inputs, _ = call(name)
    expected = function(*inputs)
    expected_gradients = torch.autograd.grad(loss(expected), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(*inputs)
        gradients = torch.autograd.grad(loss(found), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected_gradients, strict=True))


@NAMES
def test_without_gradients_no_checkpoints_are_kept(call, name):
    _, inputs, _ = call(name)
    operator = getattr(torch.ops.rwkv_train, name)
    assert operator(*(x.detach() for x in inputs), None, False)[2].numel() == 0
