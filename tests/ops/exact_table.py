"""The common table of the operators for their exact CUDA kernels.

It runs twice: over the emulation (``test_cuda_emulated.py``), and where there is a GPU on that (``test_cuda.py``).
Expected values are those of the float64 loop, on the CPU.
"""

from typing import ClassVar

import pytest
import torch

from rwkv_train.ops.compiled import addresses
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.ops.cuda import DTYPE_CODES, Platform
from rwkv_train.ops.cuda_recurrence import FLOAT32_INPUTS
from rwkv_train.ops.prepare import OPERATORS
from tests.ops.exact_kernels import FORMS, SIGNATURES, CudaKernel
from tests.ops.test_cpp_memory import Guarded
from tests.ops.test_linear_attention import CASES as LINEAR_CASES
from tests.ops.test_packed import BFLOAT16_ONCE, LENGTHS, alone, boundaries, relative_error, results
from tests.ops.test_packed import FLOAT32 as PACKED_FLOAT32
from tests.ops.test_recurrences import (
    WKV4_CASES,
    WKV4_FLOAT32_LARGE_KEYS,
    WKV4_LARGE_KEYS,
    WKV7_CASES,
    final_log_scale,
)

# What is promised, and what the other backends are held to where that is less: relative errors of norms.
FLOAT32 = {op: min(1e-5, bound) for op, bound in PACKED_FLOAT32.items()}
# A number rounded to the nearest is off by at most half of the distance to the next one; they have 8 and 11 bits.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

HEAD_SIZES = range(8, 129, 8)


def fits(case):
    return case.get("head_size", 8) in HEAD_SIZES


CASES = {
    "wkv7": {name: case for name, case in WKV7_CASES.items() if fits(case)},
    "wkv6": {name: case for name, case in LINEAR_CASES.items() if fits(case)},
    "wkv5": {name: case for name, case in LINEAR_CASES.items() if fits(case)},
    "wkv4": WKV4_CASES | WKV4_LARGE_KEYS,
}

every_form = pytest.mark.parametrize(("op", "form"), FORMS, ids=[f"{op}{form}" for op, form in FORMS])
with_heads = pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])
lengths_table = pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
dtypes = pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=["fp32", "bf16", "fp16"])


packed_or_plain = pytest.mark.parametrize("lengths", [None, [20, 0, 1, 34]], ids=["plain", "packed"])

# Rows of sequences, empty ones and ones of whole intervals among them; heads of less than, of and of more than a warp.
ROWS = {"one-token": [1], "plain": [37, 37], "packed": [0, 33, 1, 64, 0, 32, 7, 0]}
SIZES = {"smallest": (1, 8), "usual": (2, 64), "odd": (3, 40), "largest": (1, 128)}


def loss(outputs):
    y, final_state = outputs
    return y.square().sum() + final_state[:, :2].square().sum()


def usual_size(op):
    """A size that is no whole warp, nor a whole row of one."""
    return {"n_embd": 70} if op == "wkv4" else {"n_head": 2, "head_size": 24}


def assert_close(found, expected, bound):
    errors = [relative_error(x.cpu(), y) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < bound, errors


def assert_rounded_once(op, found, expected):
    """Every output is off by what float32 costs, and by one rounding to its dtype."""
    errors = [relative_error(x.cpu(), y) for x, y in zip(found, expected, strict=True)]
    bounds = [ROUNDING[x.dtype] + FLOAT32[op] for x in found]
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


class ExactTable:
    """What holds on every platform. A class of a test module names one."""

    platform: ClassVar[Platform]
    kernels: ClassVar[dict[tuple[str, str], CudaKernel]]
    device: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _in_the_tables(self, monkeypatch):
        for (op, _), kernel in self.kernels.items():
            monkeypatch.setitem(OPERATORS[op], kernel.backend, kernel.row)
        torch.compiler.reset()  # PyTorch refuses to compile one function for too many kinds of arguments

    def backend(self, op, form=""):
        return self.kernels[op, form].backend

    def here(self, problem):
        """A problem with its tensors on the device."""
        return type(problem)(
            tuple(x.to(self.device) for x in problem.inputs), *(x.to(self.device) for x in problem[1:])
        )

    def context(self, lengths):
        return packed_context(boundaries(lengths).to(self.device)) if lengths else PLAIN

    def results(self, operator, op, problem, lengths, form="", log_scale=None):
        """y, the final state and all gradients through both, by the kernel, in the dtypes of the inputs."""
        if log_scale is not None:
            log_scale = log_scale.to(self.device)
        here, context = self.here(problem), self.context(lengths)
        return results(op, operator.run, here, context, self.backend(op, form), None, log_scale)

    # ---- against the float64 loop

    @pytest.mark.parametrize(
        ("op", "form", "case"),
        [(op, form, case) for op, form in FORMS for case in CASES[op].values()],
        ids=[f"{op}{form}-{name}" for op, form in FORMS for name in CASES[op]],
    )
    def test_it_equals_the_float64_loop(self, operators, op, form, case):
        operator, problem = operators[op], operators[op].problem(**case)
        log_scale = final_log_scale(problem) if op == "wkv4" else None
        expected = results(op, operator.run, problem, PLAIN, "reference", torch.float64, log_scale)
        found = self.results(operator, op, problem, None, form, log_scale)
        assert_close(found, expected, WKV4_FLOAT32_LARGE_KEYS if "key_scale" in case else FLOAT32[op])

    @with_heads
    @pytest.mark.parametrize("head_size", HEAD_SIZES)
    def test_it_does_so_for_heads_of_any_size(self, operators, op, head_size):
        operator = operators[op]
        problem = operator.problem(batch=1, n_tokens=19, n_head=2, head_size=head_size)
        expected = results(op, operator.run, problem, PLAIN, "reference", torch.float64)
        assert_close(self.results(operator, op, problem, None), expected, FLOAT32[op])

    @pytest.mark.parametrize("op", ["wkv6", "wkv7"])
    def test_the_gradient_of_a_strong_decay_is_no_difference_of_large_numbers(self, operators, op):
        """It is 1e-7 of the gradients of r and k, whose difference would give it in exact arithmetic."""
        problem = operators[op].problem(n_tokens=70, decay="none")
        problem.inputs[1][:] = -3e-4
        problem.inputs[1][..., ::2] = -16.0
        expected = results(op, operators[op].run, problem, PLAIN, "reference", torch.float64)
        found = self.results(operators[op], op, problem, None)
        dw = 2 + 1
        assert relative_error(found[dw][..., ::2].cpu(), expected[dw][..., ::2]) < FLOAT32[op]

    # ---- dtypes

    @every_form
    @dtypes
    @packed_or_plain
    def test_nothing_is_rounded_but_inputs_and_outputs(self, operators, op, form, dtype, lengths):
        operator = operators[op]
        problem = (
            operator.packed_problem(lengths, **usual_size(op))
            if lengths
            else operator.problem(n_tokens=55, **usual_size(op))
        )
        full = operator.full_precision
        mixed = [x if i in full else x.to(dtype) for i, x in enumerate(problem.inputs)]
        rounded = type(problem)(tuple(mixed), problem.dy.to(dtype), problem.d_final)
        exact = type(problem)(tuple(x.double() for x in mixed), rounded.dy.double(), rounded.d_final)
        if lengths:
            expected, log_scale = alone(operator, op, exact, lengths)
        else:
            log_scale = final_log_scale(exact) if op == "wkv4" else None
            expected = results(op, operator.run, exact, PLAIN, "reference", torch.float64, log_scale)

        found = self.results(operator, op, rounded, lengths, form, log_scale)

        assert [x.dtype for x in found] == [dtype, torch.float32, *(x.dtype for x in mixed)]
        assert_rounded_once(op, found, expected)

    @every_form
    def test_every_input_may_be_bfloat16_but_the_state(self, operators, op, form):
        operator = operators[op]
        problem = operator.problem(n_tokens=20, **usual_size(op))
        rounded = [*(x.bfloat16() for x in problem.inputs[:-1]), problem.inputs[-1]]
        given = type(problem)(tuple(rounded), problem.dy.bfloat16(), problem.d_final)
        exact = type(problem)(tuple(x.double() for x in rounded), given.dy.double(), given.d_final)
        log_scale = final_log_scale(exact) if op == "wkv4" else None
        expected = results(op, operator.run, exact, PLAIN, "reference", torch.float64, log_scale)
        found = self.results(operator, op, given, None, form, log_scale)
        assert [x.dtype for x in found[2:]] == [x.dtype for x in rounded]
        assert_rounded_once(op, found, expected)

    @every_form
    def test_no_input_is_rounded_to_the_dtype_of_another(self, operators, op, form):
        operator = operators[op]
        problem = operator.problem(n_tokens=20, **usual_size(op))
        inputs = list(problem.inputs)
        values = 3
        inputs[values] = inputs[values].bfloat16()
        given = type(problem)(tuple(inputs), problem.dy.bfloat16(), problem.d_final)
        exact = type(problem)(tuple(x.double() for x in inputs), given.dy.double(), given.d_final)
        log_scale = final_log_scale(exact) if op == "wkv4" else None
        expected = results(op, operator.run, exact, PLAIN, "reference", torch.float64, log_scale)
        found = self.results(operator, op, given, None, form, log_scale)
        assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *(x.dtype for x in inputs)]
        assert_rounded_once(op, found, expected)

    # ---- packed rows

    @every_form
    @lengths_table
    def test_a_packed_row_equals_its_sequences_alone(self, operators, op, form, lengths):
        operator = operators[op]
        bound = FLOAT32[op]
        problem = operator.packed_problem(lengths)
        expected, log_scale = alone(operator, op, problem, lengths)
        found = self.results(operator, op, problem, lengths, form, log_scale)
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert_close(found, expected, bound)

    @every_form
    def test_one_sequence_gives_the_bits_of_a_plain_batch_of_one(self, operators, op, form):
        operator = operators[op]
        problem, scale = operator.packed_problem([40]), torch.zeros(1, 1, 1, dtype=torch.float64)
        packed, plain = (
            self.results(operator, op, problem, lengths, form, scale) for lengths in ([40], None)
        )
        assert all(torch.equal(x, y) for x, y in zip(packed, plain, strict=True))

    @every_form
    def test_a_sequence_sees_nothing_of_the_one_before_it(self, operators, op, form):
        operator, backend, context = operators[op], self.backend(op, form), self.context([33, 20])
        problem = self.here(operator.packed_problem([33, 20]))
        changed = [x.clone() for x in problem.inputs]
        for i, x in enumerate(changed[:-1]):
            if i not in operator.shared:
                x[:, :33] *= 0.5
        before = operator.run(*problem.inputs, context, backend=backend)
        after = operator.run(*changed, context, backend=backend)
        assert torch.equal(before[0][:, 33:], after[0][:, 33:])
        assert torch.equal(before[1][1], after[1][1])
        assert not torch.equal(before[0][:, :33], after[0][:, :33])

    @every_form
    def test_an_empty_sequence_hands_its_state_and_its_gradient_on(self, operators, op, form):
        operator = operators[op]
        *inputs, state = self.here(operator.packed_problem([3, 0, 2, 0])).inputs
        state = state.clone().requires_grad_()
        _, final = operator.run(*inputs, state, self.context([3, 0, 2, 0]), backend=self.backend(op, form))
        d_final = torch.rand(final.shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        (d_state,) = torch.autograd.grad(final, state, d_final)
        for s in (1, 3):
            assert torch.equal(final[s], state[s])
            assert torch.equal(d_state[s], d_final[s])

    @every_form
    def test_what_all_sequences_share_gets_a_sum_that_is_rounded_once(self, operators, op, form):
        operator, lengths = operators[op], [2] * 40
        problem = operator.packed_problem(lengths)
        rounded = [*(x.bfloat16() for x in problem.inputs[:-1]), problem.inputs[-1]]
        given = type(problem)(tuple(rounded), problem.dy.bfloat16(), 0 * problem.d_final)
        exact = type(problem)(tuple(x.double() for x in rounded), given.dy.double(), given.d_final)
        expected, log_scale = alone(operator, op, exact, lengths)
        found = self.results(operator, op, given, lengths, form, log_scale)
        for i in operator.shared:
            assert found[2 + i].dtype == torch.bfloat16
            assert relative_error(found[2 + i].cpu(), expected[2 + i]) < BFLOAT16_ONCE

    # ---- what every operator promises

    @every_form
    def test_the_same_call_gives_the_same_bits(self, operators, op, form):
        operator, lengths = operators[op], [40, 0, 37]
        problem = operator.packed_problem(lengths, **usual_size(op))
        scale = torch.zeros(3, 1, 1, dtype=torch.float64)
        first, again = (self.results(operator, op, problem, lengths, form, scale) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))

    @every_form
    def test_views_with_gaps_are_read_as_what_they_show(self, operators, op, form):
        operator = operators[op]
        problem, scale = operator.problem(), torch.zeros(2, 1, 1, dtype=torch.float64)
        views = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in problem.inputs]
        assert not views[0].is_contiguous()
        expected, found = (
            self.results(operator, op, problem._replace(inputs=tuple(x)), None, form, scale)
            for x in (problem.inputs, views)
        )
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    @every_form
    @pytest.mark.parametrize("output", [0, 1], ids=["y", "final-state"])
    def test_a_gradient_through_one_output_alone_is_right(self, operators, op, form, output):
        operator, problem = operators[op], operators[op].problem()

        def gradient(backend, given, dtype):
            inputs = [x.to(dtype) for x in given.inputs]
            k = inputs[2].requires_grad_()
            outputs = operator.run(*inputs, PLAIN, backend=backend)
            return torch.autograd.grad(outputs[output][:, :2].sum(), k)[0].cpu()

        found = gradient(self.backend(op, form), self.here(problem), torch.float32)
        expected = gradient("reference", problem, torch.float64)
        assert relative_error(found, expected) < PACKED_FLOAT32[op]

    @every_form
    def test_a_nan_is_not_hidden(self, operators, op, form):
        operator, problem = operators[op], self.here(operators[op].problem())
        for i, x in enumerate(problem.inputs):
            inputs = list(problem.inputs)
            inputs[i] = x.clone()
            inputs[i].view(-1)[0] = torch.nan
            y, _ = operator.run(*inputs, PLAIN, backend=self.backend(op, form))
            assert y.isnan().any(), i

    @every_form
    @pytest.mark.parametrize("batch", [0, 2])
    def test_no_tokens_or_no_rows_leave_the_state_as_it_is(self, operators, op, form, batch):
        operator = operators[op]
        problem = self.here(operator.problem(batch=batch, n_tokens=0 if batch else 5))
        inputs = [x.requires_grad_() for x in problem.inputs]
        y, final_state = operator.run(*inputs, PLAIN, backend=self.backend(op, form))
        assert y.shape == problem.dy.shape
        assert torch.equal(final_state, problem.inputs[-1])
        gradients = torch.autograd.grad(
            y.sum() + final_state.sum(), inputs, materialize_grads=True, allow_unused=True
        )
        assert [x.shape for x in gradients] == [x.shape for x in inputs]
        assert all(not x.any() for x in gradients[:-1])

    @every_form
    @pytest.mark.parametrize("split", [1, 8, 17, 32, 40])
    def test_the_state_carries_everything_across_a_split(self, operators, op, form, split):
        operator, problem = operators[op], self.here(operators[op].problem(n_tokens=41))
        *inputs, start = problem.inputs
        by_token = [x.shape == problem.dy.shape for x in inputs]

        def run(tokens, state):
            piece = [x[:, tokens] if cut else x for x, cut in zip(inputs, by_token, strict=True)]
            return operator.run(*piece, state, PLAIN, backend=self.backend(op, form))

        whole, final = run(slice(None), start)
        head, middle = run(slice(split), start)
        tail, end = run(slice(split, None), middle)
        torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(end, final, atol=1e-5, rtol=1e-5)

    @every_form
    @dtypes
    def test_a_step_equals_forward(self, operators, op, form, dtype):
        """Without gradients one token takes the kernel for decoding; with them it takes that for any length."""
        operator = operators[op]
        problem = self.here(operator.problem(batch=3, n_tokens=1, **usual_size(op)))
        inputs = [x if i in operator.full_precision else x.to(dtype) for i, x in enumerate(problem.inputs)]
        step = operator.run(*inputs, PLAIN, backend=self.backend(op, form))
        leaves = [x.clone().requires_grad_() for x in inputs]
        forward = operator.run(*leaves, PLAIN, backend=self.backend(op, form))
        assert step[0].dtype == dtype
        assert relative_error(step[0], forward[0]) < ROUNDING[dtype] + FLOAT32[op]
        torch.testing.assert_close(step[1], forward[1], atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("op", list(SIGNATURES))
    def test_decoding_token_by_token_equals_the_float64_loop(self, operators, op):
        operator = operators[op]
        problem = operator.problem(n_tokens=12, **usual_size(op))
        *inputs, state = self.here(problem).inputs
        outputs = []
        for t in range(12):
            token = [x[:, t : t + 1] if x.shape == problem.dy.shape else x for x in inputs]
            y, state = operator.run(*token, state, PLAIN, backend=self.backend(op))
            outputs.append(y)
        expected, _ = operator.run(*(x.double() for x in problem.inputs), PLAIN, backend="reference")
        assert relative_error(torch.cat(outputs, dim=1).cpu(), expected) < FLOAT32[op]

    @every_form
    def test_tensors_that_begin_anywhere_in_their_memory_are_read(self, operators, op, form):
        operator, problem = operators[op], self.here(operators[op].problem())
        moved = []
        for x in problem.inputs:
            memory = x.new_empty(x.numel() + 1)
            moved.append(memory[1:].view(x.shape).copy_(x))
            assert moved[-1].data_ptr() % 16 == 4
        expected = operator.run(*problem.inputs, PLAIN, backend=self.backend(op, form))
        found = operator.run(*moved, PLAIN, backend=self.backend(op, form))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    # ---- memory: the functions called with raw addresses, as Python does

    @every_form
    @pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
    @pytest.mark.parametrize("lengths", list(ROWS.values()), ids=list(ROWS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_it_writes_all_of_its_outputs_and_nothing_else(self, operators, op, form, size, lengths, dtype):
        starts = None if len(set(lengths)) == 1 else boundaries(lengths).to(self.device)
        outputs = self.call_with_guards(operators[op], op, form, size, lengths, starts, dtype)
        for output in outputs:
            assert output.isfinite().all()

    @every_form
    @pytest.mark.parametrize("starts", [[0, 80, 7, 75], [-5, 20, 40, 1 << 40], [75, 75, 0, 0]], ids=str)
    def test_wrong_boundaries_never_lead_out_of_the_tensors(self, operators, op, form, starts):
        """Python cannot look at them without waiting for the GPU."""
        size, lengths = (1, 24), [25, 25, 25]
        starts = torch.tensor(starts, device=self.device)
        self.call_with_guards(operators[op], op, form, size, lengths, starts, torch.float32)

    def call_with_guards(self, operator, op, form, size, lengths, starts, dtype):
        """Run forward and backward on outputs and scratch full of NaN, all amid guards; return what was written."""
        kernel, (n_head, head_size) = self.kernels[op, form], size
        n_tokens, n_sequences = sum(lengths), len(lengths)
        sizes = (n_head * head_size,) if op == "wkv4" else size
        problem = operator.packed_problem(
            lengths, **({"n_embd": sizes[0]} if op == "wkv4" else {"n_head": n_head, "head_size": head_size})
        )
        state = problem.inputs[-1]
        library = kernel.load()
        function = {
            name: getattr(library, f"rwkv_{op}_{name}{form}")
            for name in ("forward", "backward", "workspace_bytes")
        }

        guarded = Guarded(self.device)
        by_dtype = [name not in FLOAT32_INPUTS for name in kernel.signature.inputs]
        inputs = [
            guarded.copy(x.to(dtype if yes else torch.float32))
            for x, yes in zip(problem.inputs, by_dtype, strict=True)
        ]
        y, final_state = guarded.output(*problem.dy.shape, dtype=dtype), guarded.output(*state.shape)
        n_checkpoints = n_tokens // kernel.signature.checkpoint_tokens + n_sequences
        checkpoints = guarded.output(n_checkpoints, *state.shape[1:])
        gradients = [
            guarded.output(*shape, dtype=dtype if yes else torch.float32)
            for shape, yes in zip(
                kernel.signature.gradient_shapes([*inputs[:-1], state]), by_dtype, strict=True
            )
        ]
        dy, d_final = guarded.copy(problem.dy.to(dtype)), guarded.copy(torch.ones_like(state))

        stream, code = self.platform.current_stream(torch.device(self.device)), DTYPE_CODES[dtype]
        for is_backward, tensors in (
            (False, (*inputs, y, final_state, checkpoints)),
            (True, (*inputs[:-1], checkpoints, dy, d_final, *gradients)),
        ):
            n_bytes = function["workspace_bytes"](is_backward, n_sequences, n_tokens, *sizes)
            assert n_bytes % 4 == 0
            scratch = guarded.output(n_bytes // 4)
            error = function["backward" if is_backward else "forward"](
                code, n_sequences, n_tokens, *sizes, *addresses(starts, *tensors, scratch), stream
            )
            assert error == 0, getattr(library, f"rwkv_{op}_error")(error).decode()
        guarded.assert_untouched()
        return y, final_state, *gradients

    @pytest.mark.parametrize("op", list(SIGNATURES))
    @dtypes
    def test_a_step_writes_its_outputs_and_nothing_else_and_may_do_so_over_its_state(
        self, operators, op, dtype
    ):
        kernel, operator = self.kernels[op, ""], operators[op]
        problem = operator.problem(batch=3, n_tokens=1, **usual_size(op))
        names, guarded = kernel.signature.inputs, Guarded(self.device)
        inputs = [
            guarded.copy(x.to(torch.float32 if name in FLOAT32_INPUTS else dtype))
            for name, x in zip(names, problem.inputs, strict=True)
        ]
        expected = operator.run(*inputs, PLAIN, backend=kernel.backend)
        y, sizes = guarded.output(*problem.dy.shape, dtype=dtype), problem.dy.shape[2:]
        step, stream = (
            getattr(kernel.load(), f"rwkv_{op}_step"),
            self.platform.current_stream(torch.device(self.device)),
        )
        assert step(DTYPE_CODES[dtype], 3, *sizes, *addresses(*inputs, y, inputs[-1]), stream) == 0
        guarded.assert_untouched()
        assert torch.equal(y, expected[0])
        assert torch.equal(inputs[-1], expected[1])

    # ---- PyTorch

    def operator_call(self, operators, op, form, lengths):
        """Return (function of the tensors, fresh inputs that want gradients, cu_seqlens)."""
        operator, context = operators[op], self.context(lengths)
        problem = self.here(operator.packed_problem(lengths) if lengths else operator.problem())
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        return (
            (lambda *x: operator.run(*x, context, backend=self.backend(op, form))),
            inputs,
            context.cu_seqlens,
        )

    @every_form
    @packed_or_plain
    def test_both_operators_pass_opcheck(self, operators, op, form, lengths):
        name = f"{op}_{self.backend(op, form)}"
        forward, backward = (
            getattr(torch.ops.rwkv_train, part).default for part in (name, f"{name}_backward")
        )
        _, inputs, cu_seqlens = self.operator_call(operators, op, form, lengths)
        torch.library.opcheck(forward, (*inputs, cu_seqlens, True))
        inputs = [x.detach() for x in inputs]
        torch.library.opcheck(forward, (*inputs, cu_seqlens, False))
        y, final_state, checkpoints = forward(*inputs, cu_seqlens, True)
        torch.library.opcheck(backward, (*inputs[:-1], cu_seqlens, checkpoints, y, final_state))

    @every_form
    @packed_or_plain
    def test_compiled_as_one_graph_it_gives_the_same_bits(self, operators, op, form, lengths):
        function, inputs, _ = self.operator_call(operators, op, form, lengths)
        expected = torch.autograd.grad(loss(function(*inputs)), inputs)
        compiled = torch.compile(lambda *x: loss(function(*x)), fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    @every_form
    def test_other_boundaries_are_no_other_graph(self, operators, op, form):
        operator, backend, graphs = operators[op], self.backend(op, form), []
        *inputs, state = self.here(operator.packed_problem([30, 5, 5])).inputs

        def count(graph, _):
            graphs.append(graph)
            return graph

        compiled = torch.compile(
            lambda context: operator.run(*inputs, state, context, backend=backend),
            fullgraph=True,
            backend=count,
        )
        for lengths in ([30, 5, 5], [1, 0, 39], [13, 13, 14]):
            context = self.context(lengths)
            expected = operator.run(*inputs, state, context, backend=backend)
            assert all(torch.equal(x, y) for x, y in zip(compiled(context), expected, strict=True))
        assert len(graphs) == 1

    @every_form
    def test_autocast_changes_nothing(self, operators, op, form):
        function, inputs, _ = self.operator_call(operators, op, form, None)
        expected = function(*inputs)
        expected_gradients = torch.autograd.grad(loss(expected), inputs)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            found = function(*inputs)
            gradients = torch.autograd.grad(loss(found), inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(gradients, expected_gradients, strict=True))
