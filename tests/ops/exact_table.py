"""The common table of the operators for their exact CUDA kernels.

It runs twice: over the emulation (``test_cuda_emulated.py``), and where there is a GPU on that (``test_cuda.py``).
"""

import pytest
import torch

from rwkv_train.ops.compiled import addresses
from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.cuda import DTYPE_CODES
from rwkv_train.ops.cuda_recurrence import FLOAT32_INPUTS
from tests.ops.exact_kernels import FORMS
from tests.ops.kernel_table import ROUNDING, KernelTable, packed_or_plain
from tests.ops.test_cpp_memory import Guarded
from tests.ops.test_linear_attention import CASES as LINEAR_CASES
from tests.ops.test_packed import BFLOAT16_ONCE, LENGTHS, alone, boundaries, relative_error
from tests.ops.test_packed import FLOAT32 as PACKED_FLOAT32
from tests.ops.test_recurrences import WKV4_CASES, WKV4_FLOAT32_LARGE_KEYS, WKV4_LARGE_KEYS, WKV7_CASES

# What is promised, and what the other backends are held to where that is less: relative errors of norms.
FLOAT32 = {op: min(1e-5, bound) for op, bound in PACKED_FLOAT32.items()}

HEAD_SIZES = range(8, 129, 8)


def fits(case):
    return case.get("head_size", 8) in HEAD_SIZES


CASES = {
    "wkv7": {name: case for name, case in WKV7_CASES.items() if fits(case)},
    "wkv6": {name: case for name, case in LINEAR_CASES.items() if fits(case)},
    "wkv5": {name: case for name, case in LINEAR_CASES.items() if fits(case)},
    "wkv4": WKV4_CASES | WKV4_LARGE_KEYS,
}

with_heads = pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])
lengths_table = pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
dtypes = pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=["fp32", "bf16", "fp16"])

# Rows of sequences, empty ones and ones of whole intervals among them; heads of less than, of and of more than a warp.
ROWS = {"one-token": [1], "plain": [37, 37], "packed": [0, 33, 1, 64, 0, 32, 7, 0]}
SIZES = {"smallest": (1, 8), "usual": (2, 64), "odd": (3, 40), "largest": (1, 128)}


def usual_size(op):
    """A size that is no whole warp, nor a whole row of one."""
    return {"n_embd": 70} if op == "wkv4" else {"n_head": 2, "head_size": 24}


def assert_rounded_once(op, found, expected):
    """Every output is off by what float32 costs, and by one rounding to its dtype."""
    errors = [relative_error(x.cpu(), y) for x, y in zip(found, expected, strict=True)]
    bounds = [ROUNDING[x.dtype] + FLOAT32[op] for x in found]
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


class ExactTable(KernelTable):
    """What holds on every platform."""

    forms = FORMS
    main_form = ""

    def problem(self, operator, op, lengths=None, **options):
        options = usual_size(op) | options
        return operator.packed_problem(lengths, **options) if lengths else operator.problem(**options)

    def bound(self, op, form=None):
        return FLOAT32[op]

    # ---- against the float64 loop

    @pytest.mark.parametrize(
        ("op", "form", "case"),
        [(op, form, case) for op, form in FORMS for case in CASES[op].values()],
        ids=[f"{op}{form}-{name}" for op, form in FORMS for name in CASES[op]],
    )
    def test_it_equals_the_float64_loop(self, operators, op, form, case):
        problem = operators[op].problem(**case)
        expected, log_scale = self.expected(operators[op], op, problem)
        found = self.results(operators[op], op, problem, None, form, log_scale)
        errors = [relative_error(x.cpu(), y) for x, y in zip(found, expected, strict=True)]
        assert max(errors) < (WKV4_FLOAT32_LARGE_KEYS if "key_scale" in case else FLOAT32[op]), errors

    @with_heads
    @pytest.mark.parametrize("head_size", HEAD_SIZES)
    def test_it_does_so_for_heads_of_any_size(self, operators, op, head_size):
        problem = operators[op].problem(batch=1, n_tokens=19, n_head=2, head_size=head_size)
        expected, _ = self.expected(operators[op], op, problem)
        self.assert_close(op, "", self.results(operators[op], op, problem, None), expected)

    @pytest.mark.parametrize("op", ["wkv6", "wkv7"])
    def test_the_gradient_of_a_strong_decay_is_no_difference_of_large_numbers(self, operators, op):
        """It is 1e-7 of the gradients of r and k, whose difference would give it in exact arithmetic."""
        problem = operators[op].problem(n_tokens=70, decay="none")
        problem.inputs[1][:] = -3e-4
        problem.inputs[1][..., ::2] = -16.0
        expected, _ = self.expected(operators[op], op, problem)
        found = self.results(operators[op], op, problem, None)
        dw = 2 + 1
        assert relative_error(found[dw][..., ::2].cpu(), expected[dw][..., ::2]) < FLOAT32[op]

    # ---- dtypes

    @dtypes
    @packed_or_plain
    def test_nothing_is_rounded_but_inputs_and_outputs(self, operators, op, form, dtype, lengths):
        operator = operators[op]
        problem = self.problem(operator, op, lengths, **({} if lengths else {"n_tokens": 55}))
        full = operator.full_precision
        mixed = [x if i in full else x.to(dtype) for i, x in enumerate(problem.inputs)]
        rounded = type(problem)(tuple(mixed), problem.dy.to(dtype), problem.d_final)
        exact = type(problem)(tuple(x.double() for x in mixed), rounded.dy.double(), rounded.d_final)
        if lengths:
            expected, log_scale = alone(operator, op, exact, lengths)
        else:
            expected, log_scale = self.expected(operator, op, exact)

        found = self.results(operator, op, rounded, lengths, form, log_scale)

        assert [x.dtype for x in found] == [dtype, torch.float32, *(x.dtype for x in mixed)]
        assert_rounded_once(op, found, expected)

    def test_every_input_may_be_bfloat16_but_the_state(self, operators, op, form):
        operator = operators[op]
        problem = self.problem(operator, op, n_tokens=20)
        rounded = [*(x.bfloat16() for x in problem.inputs[:-1]), problem.inputs[-1]]
        given = type(problem)(tuple(rounded), problem.dy.bfloat16(), problem.d_final)
        exact = type(problem)(tuple(x.double() for x in rounded), given.dy.double(), given.d_final)
        expected, log_scale = self.expected(operator, op, exact)
        found = self.results(operator, op, given, None, form, log_scale)
        assert [x.dtype for x in found[2:]] == [x.dtype for x in rounded]
        assert_rounded_once(op, found, expected)

    def test_no_input_is_rounded_to_the_dtype_of_another(self, operators, op, form):
        operator = operators[op]
        problem = self.problem(operator, op, n_tokens=20)
        inputs = list(problem.inputs)
        values = 3
        inputs[values] = inputs[values].bfloat16()
        given = type(problem)(tuple(inputs), problem.dy.bfloat16(), problem.d_final)
        exact = type(problem)(tuple(x.double() for x in inputs), given.dy.double(), given.d_final)
        expected, log_scale = self.expected(operator, op, exact)
        found = self.results(operator, op, given, None, form, log_scale)
        assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *(x.dtype for x in inputs)]
        assert_rounded_once(op, found, expected)

    # ---- packed rows

    @lengths_table
    def test_a_packed_row_equals_its_sequences_alone(self, operators, op, form, lengths):
        operator = operators[op]
        problem = operator.packed_problem(lengths)
        expected, log_scale = alone(operator, op, problem, lengths)
        found = self.results(operator, op, problem, lengths, form, log_scale)
        assert [x.shape for x in found] == [x.shape for x in expected]
        self.assert_close(op, form, found, expected)

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

    # ---- steps

    @dtypes
    def test_a_step_equals_forward(self, operators, op, form, dtype):
        """Without gradients one token takes the kernel for decoding; with them it takes that for any length."""
        operator = operators[op]
        problem = self.here(self.problem(operator, op, batch=3, n_tokens=1))
        inputs = [x if i in operator.full_precision else x.to(dtype) for i, x in enumerate(problem.inputs)]
        step = operator.run(*inputs, PLAIN, backend=self.backend(op, form))
        leaves = [x.clone().requires_grad_() for x in inputs]
        forward = operator.run(*leaves, PLAIN, backend=self.backend(op, form))
        assert step[0].dtype == dtype
        assert relative_error(step[0], forward[0]) < ROUNDING[dtype] + FLOAT32[op]
        torch.testing.assert_close(step[1], forward[1], atol=1e-6, rtol=1e-5)

    def test_decoding_token_by_token_equals_the_float64_loop(self, operators, op):
        operator = operators[op]
        problem = self.problem(operator, op, n_tokens=12)
        *inputs, state = self.here(problem).inputs
        outputs = []
        for t in range(12):
            token = [x[:, t : t + 1] if x.shape == problem.dy.shape else x for x in inputs]
            y, state = operator.run(*token, state, PLAIN, backend=self.backend(op))
            outputs.append(y)
        expected, _ = operator.run(*(x.double() for x in problem.inputs), PLAIN, backend="reference")
        assert relative_error(torch.cat(outputs, dim=1).cpu(), expected) < FLOAT32[op]

    # ---- memory

    @pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
    @pytest.mark.parametrize("lengths", list(ROWS.values()), ids=list(ROWS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_it_writes_all_of_its_outputs_and_nothing_else(self, operators, op, form, size, lengths, dtype):
        starts = None if len(set(lengths)) == 1 else boundaries(lengths).to(self.device)
        outputs = self.call_with_guards(operators[op], op, form, size, lengths, starts, dtype)
        for output in outputs:
            assert output.isfinite().all()

    @pytest.mark.parametrize("starts", [[0, 80, 7, 75], [-5, 20, 40, 1 << 40], [75, 75, 0, 0]], ids=str)
    def test_wrong_boundaries_never_lead_out_of_the_tensors(self, operators, op, form, starts):
        """Python cannot look at them without waiting for the GPU."""
        size, lengths = (1, 24), [25, 25, 25]
        starts = torch.tensor(starts, device=self.device)
        self.call_with_guards(operators[op], op, form, size, lengths, starts, torch.float32)

    @dtypes
    def test_a_step_writes_its_outputs_and_nothing_else_and_may_do_so_over_its_state(
        self, operators, op, dtype
    ):
        kernel, operator = self.kernels[op, ""], operators[op]
        problem = self.problem(operator, op, batch=3, n_tokens=1)
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
