"""How Python calls a library of CUDA kernels, held against one that only notes what it is asked."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from rwkv_train.errors import BackendError
from rwkv_train.ops.context import PLAIN, SequenceContext
from rwkv_train.ops.cuda import Platform
from rwkv_train.ops.cuda_recurrence import check_places
from rwkv_train.ops.prepare import OPERATORS
from tests.ops.chunked_kernels import CHUNKED_FORMS, chunked_kernels
from tests.ops.exact_kernels import FORMS, SIGNATURES, exact_kernels

STREAM = 1234
WORKSPACE_BYTES = 4096


class Call(NamedTuple):
    name: str
    arguments: tuple
    on_device: bool
    """Whether it was made while the tensors' device was the current one."""


class Notebook:
    """A library whose functions note their arguments and return ``error``; and the platform that it runs on."""

    def __init__(self):
        self.calls: list[Call] = []
        self.loaded: list[str] = []
        self.error = 0
        self.is_on_device = False
        self.functions: dict[str, Callable] = {}

    def load(self, op):
        self.loaded.append(op)
        return self

    @contextmanager
    def on_device(self, device):
        self.is_on_device = True
        yield
        self.is_on_device = False

    def __getattr__(self, name):
        if not name.startswith("rwkv_"):
            raise AttributeError(name)
        kind = name.removeprefix("rwkv_").split("_", 1)[1]
        if name not in self.functions:

            def function(*arguments):
                if kind.startswith("checkpoint_tokens"):
                    return {"": 16, "_chunked": 64}[kind.removeprefix("checkpoint_tokens")]
                if kind == "error":
                    return b"what CUDA says"
                self.calls.append(Call(kind, arguments, self.is_on_device))
                return WORKSPACE_BYTES if kind.startswith("workspace") else self.error

            self.functions[name] = function
        return self.functions[name]

    def last(self, kind):
        return next(call for call in reversed(self.calls) if call.name == kind)


NOTEBOOK = Notebook()
PLATFORM = Platform("CPU", NOTEBOOK.load, NOTEBOOK.on_device, current_stream=lambda device: STREAM)
KERNELS = exact_kernels(PLATFORM, "noted") | chunked_kernels(PLATFORM, "noted_chunked")

every_op = pytest.mark.parametrize("op", list(SIGNATURES))
every_form = pytest.mark.parametrize(
    ("op", "form"),
    [*FORMS, *CHUNKED_FORMS],
    ids=[f"{op}{form}" for op, form in [*FORMS, *CHUNKED_FORMS]],
)
every_chunked_form = pytest.mark.parametrize(
    ("op", "form"), CHUNKED_FORMS, ids=[f"{op}{form}" for op, form in CHUNKED_FORMS]
)


@pytest.fixture
def library(monkeypatch):
    for (op, _), kernel in KERNELS.items():
        monkeypatch.setitem(OPERATORS[op], kernel.backend, kernel.row)
    NOTEBOOK.calls.clear()
    NOTEBOOK.error = 0
    NOTEBOOK.is_on_device = False
    return NOTEBOOK


def run(operators, op, form="", context=PLAIN, with_gradients=False, **size):
    operator = operators[op]
    if context.cu_seqlens is None:
        problem = operator.problem(**size)
    else:
        problem = operator.packed_problem([21] * (len(context.cu_seqlens) - 1))
    inputs = [x.requires_grad_(with_gradients) for x in problem.inputs]
    outputs = operator.run(*inputs, context, backend=f"noted{form}")
    if with_gradients:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs], allow_unused=True)


def count(op):
    """How many sizes stand in a call between the number of tokens and the addresses."""
    return SIGNATURES[op].n_sizes


@every_form
def test_every_call_is_made_on_the_device_of_the_tensors_and_on_the_current_stream(
    library, operators, op, form
):
    run(operators, op, form, with_gradients=True)
    launches = [call for call in library.calls if not call.name.startswith("workspace")]
    assert [call.name for call in launches] == [f"forward{form}", f"backward{form}"]
    assert all(call.on_device and call.arguments[-1] == STREAM for call in launches)


@every_op
def test_a_plain_batch_passes_no_boundaries(library, operators, op):
    run(operators, op, with_gradients=True)
    for name in ("forward", "backward"):
        dtype, n_sequences, n_tokens, *rest = library.last(name).arguments
        assert (dtype, n_sequences, n_tokens) == (0, 2, 42)
        assert rest[count(op)] is None


@every_op
def test_boundaries_are_handed_on_and_never_looked_at(library, operators, op):
    """A GPU would be waited for; so not even impossible ones are refused."""
    starts = torch.tensor([7, -1, 1 << 40])
    run(operators, op, context=SequenceContext(starts), with_gradients=True)
    for name in ("forward", "backward"):
        _, n_sequences, n_tokens, *rest = library.last(name).arguments
        assert (n_sequences, n_tokens, rest[count(op)]) == (2, 42, starts.data_ptr())


@every_op
@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)],
    ids=["fp32", "bf16", "fp16"],
)
def test_the_dtype_is_that_of_the_values(library, operators, op, dtype, code):
    inputs = operators[op].problem().inputs
    full = operators[op].full_precision
    given = [x if i in full else x.to(dtype) for i, x in enumerate(inputs)]
    y, final_state = operators[op].run(*given, PLAIN, backend="noted")
    assert library.last("forward").arguments[0] == code
    assert (y.dtype, final_state.dtype) == (dtype, torch.float32)


@every_op
def test_inputs_of_several_dtypes_are_read_in_float32(library, operators, op):
    inputs = list(operators[op].problem().inputs)
    inputs[3] = inputs[3].bfloat16()
    y, _ = operators[op].run(*inputs, PLAIN, backend="noted")
    assert library.last("forward").arguments[0] == 0
    assert y.dtype == torch.bfloat16


@every_chunked_form
def test_a_chunked_form_reads_bfloat16_and_gives_every_gradient_the_dtype_of_its_input(
    library, operators, op, form
):
    inputs = [x.requires_grad_() for x in operators[op].problem().inputs]
    inputs[3] = inputs[3].detach().bfloat16().requires_grad_()
    y, final_state = operators[op].run(*inputs, PLAIN, backend=f"noted{form}")
    assert (y.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad((y, final_state), inputs, (y, final_state))
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]
    for name in ("forward", "backward"):
        assert library.last(f"{name}{form}").arguments[0] == 1


@every_chunked_form
def test_a_chunked_form_keeps_a_state_in_bfloat16_every_64_tokens(library, operators, op, form):
    inputs = operators[op].problem(n_tokens=100).inputs
    forward = getattr(torch.ops.rwkv_train, f"{op}_noted{form}")
    checkpoints = forward(*inputs, None, True)[2]
    assert checkpoints.shape == (2 * 100 // 64 + 2, 2, 8, 8)
    assert checkpoints.dtype == torch.bfloat16
    assert library.last(f"forward{form}").arguments[-3] == checkpoints.data_ptr()


@every_chunked_form
@pytest.mark.parametrize("keep_checkpoints", [True, False])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(library, operators, op, form, keep_checkpoints):
    inputs = operators[op].problem(n_tokens=100).inputs
    operator = getattr(torch.ops.rwkv_train, f"{op}_noted{form}").default
    torch.library.opcheck(operator, (*inputs, None, keep_checkpoints), test_utils="test_faketensor")


@every_op
def test_without_gradients_one_token_of_each_row_is_a_step(library, operators, op):
    run(operators, op, n_tokens=1)
    assert [call.name for call in library.calls] == ["step"]
    dtype, n_sequences, *rest = library.calls[0].arguments
    assert (dtype, n_sequences) == (0, 2)
    assert len(rest) == count(op) + len(SIGNATURES[op].inputs) + 3


@every_chunked_form
def test_a_step_of_a_chunked_form_is_that_of_the_exact_kernels(library, operators, op, form):
    run(operators, op, form, n_tokens=1)
    assert [call.name for call in library.calls] == ["step"]


@every_op
def test_with_gradients_one_token_is_a_text_like_any_other(library, operators, op):
    run(operators, op, n_tokens=1, with_gradients=True)
    assert "step" not in {call.name for call in library.calls}


@every_op
def test_checkpoints_are_asked_for_only_where_a_backward_pass_follows(library, operators, op):
    run(operators, op)
    without = library.last("forward").arguments
    run(operators, op, with_gradients=True)
    assert without[-3] is None
    assert library.last("forward").arguments[-3] is not None


@every_form
def test_a_kernel_gets_the_scratch_that_it_asks_for(library, operators, op, form):
    run(operators, op, form, with_gradients=True)
    sizes = operators[op].problem().dy.shape[2:]
    asked = [call.arguments for call in library.calls if call.name == f"workspace_bytes{form}"]
    assert asked == [(False, 2, 42, *sizes), (True, 2, 42, *sizes)]
    assert all(library.last(f"{name}{form}").arguments[-2] for name in ("forward", "backward"))


@every_op
def test_nothing_is_launched_for_nothing(library, operators, op):
    run(operators, op, batch=0, with_gradients=True)
    run(operators, op, n_tokens=0, with_gradients=True)
    assert library.calls == []


@every_op
def test_an_error_of_cuda_is_raised_with_what_cuda_says(library, operators, op):
    library.error = 700
    said = rf"kernel rwkv_{op}_forward failed: what CUDA says, by this or by an earlier .* \(CUDA error 700\)"
    with pytest.raises(RuntimeError, match=said):
        run(operators, op)
    said = rf"kernel rwkv_{op}_step failed"
    with pytest.raises(RuntimeError, match=said):
        run(operators, op, n_tokens=1)


@every_op
@pytest.mark.parametrize(
    ("code", "remedy"),
    [(209, "run 'rwkv-train build-kernels'"), (35, "update the driver")],
    ids=["chip", "driver"],
)
def test_a_library_that_does_not_fit_is_answered_with_the_remedy(library, operators, op, code, remedy):
    library.error = code
    with pytest.raises(BackendError, match=rf"{op} does not run here \(what CUDA says\): .*{remedy}"):
        run(operators, op)


@every_op
def test_boundaries_of_another_dtype_are_refused(library, operators, op):
    starts = torch.tensor([0, 21], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens must be torch\.int64, not torch\.int32"):
        run(operators, op, context=SequenceContext(starts))
    assert library.calls == []


def test_tensors_of_several_devices_are_refused():
    here, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match="on one device: r is on cpu, state on meta"):
        check_places(("r", "k", "state"), (here, here, elsewhere), None)
    with pytest.raises(ValueError, match="on one device: r is on meta, cu_seqlens on cpu"):
        check_places(("r",), (elsewhere,), torch.tensor([0, 1]))


@every_op
def test_the_backend_of_the_table_is_the_one_for_cuda(op):
    """Registered for CUDA tensors alone, under a name that says which kernels these are."""
    for backend in (name for name in OPERATORS[op] if name.startswith("cuda")):
        for operator in (f"rwkv_train::{op}_{backend}", f"rwkv_train::{op}_{backend}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")
