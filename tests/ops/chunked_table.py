"""The common table of the operators for their CUDA kernels on tensor cores, which read and write bfloat16.

It runs twice: over the emulation (``test_cuda_chunked_emulated.py``), and where there is a GPU on that
(``test_cuda.py``). Expected values are those of the float64 loop on the same inputs. ``tests.ops.kernel_errors``
measures on long texts what is held to bounds here on short ones.
"""

import functools

import pytest
import torch

from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.cuda import DTYPE_CODES
from tests.ops.chunked_cases import CASES, WKV7_CASES, Case, make_packed_problem, make_problem
from tests.ops.conftest import OPERATORS
from tests.ops.kernel_table import KernelTable
from tests.ops.test_packed import alone, boundaries, relative_error, results

# Relative errors of norms. A product of bfloat16 rounds the factors that are sums themselves; those that later sums
# depend on most are kept in two parts. Rounding an output costs 1.7e-3 of it.
REALISTIC = 5e-3
# With every factor rounded once, gradients of what is removed are off by 5.5e-3 before they are rounded.
BFLOAT16_PRODUCTS = 6.5e-3
# A head whose keys all but point one way removes almost all of what it has just written. What is left depends on digits
# that bfloat16 does not have: moving the inputs by one rounding changes gradients by 5e-3 to 15e-3 (kernel_errors).
PARALLEL_KEYS = {"_chunked_whole": 12e-3, "_chunked_segments": 12e-3, "_chunked_bf16": 16e-3}

FORMS = [
    *((op, form) for op in ("wkv7", "wkv6", "wkv5") for form in ("_chunked_whole", "_chunked_segments")),
    ("wkv7", "_chunked_bf16"),
]
HEAD_SIZES = [64, 128]
N_TOKENS = 130
"""Whole chunks and segments, and two tokens more."""
LONG = 1600
"""More than where every kernel begins to cut a sequence that has few others beside it."""

EXTREME_DECAYS = {
    "no decay": Case((0.0, 0.0)),
    "strong decay": Case((20.0, 20.0)),
    "decay of e^5": Case((148.4, 148.4)),
    "total decay": Case((1000.0, 1000.0)),
    "mixed decay": Case((1e-4, 1e4)),
}
VALUES = {
    "wkv7": WKV7_CASES | {"no decay": Case((0.0, 0.0)), "largest decay": Case((0.1, 5.0))},
    "wkv6": CASES["wkv6"] | EXTREME_DECAYS,
    "wkv5": CASES["wkv5"] | EXTREME_DECAYS,
}

AROUND_CHUNKS = [0, 1, 15, 16, 17, 63, 64, 65, 130]
ROWS = {"one-token": [1], "plain": [37, 37], "packed": [0, 33, 1, 64, 0, 32, 7, 0], "segments": [65, 0, 130]}
SIZES = {"heads-of-64": (2, 64), "heads-of-128": (1, 128)}


@functools.cache
def values_case(op, name):
    """A problem, and what the float64 loop makes of it."""
    problem = make_problem(op, VALUES[op][name], N_TOKENS)
    return problem, results(op, OPERATORS[op].run, problem, PLAIN, "reference", torch.float64)


@functools.cache
def packed_case(op, head_size):
    n_head = 128 // head_size
    problem = make_packed_problem(op, CASES[op]["realistic"], AROUND_CHUNKS, n_head, head_size)
    return problem, alone(OPERATORS[op], op, problem, AROUND_CHUNKS)[0]


class ChunkedTable(KernelTable):
    """What holds on every platform."""

    forms = FORMS
    main_form = "_chunked"

    def problem(self, operator, op, lengths=None, **options):
        case = CASES[op]["realistic"]
        if lengths:
            return make_packed_problem(op, case, lengths, **options)
        return make_problem(op, case, **({"batch": 2, "n_tokens": 21} | options))

    def bound(self, op, form=None):
        return BFLOAT16_PRODUCTS if form == "_chunked_bf16" else REALISTIC

    # ---- against the float64 loop

    @pytest.mark.parametrize(
        ("op", "form", "case"),
        [(op, form, case) for op, form in FORMS for case in VALUES[op]],
        ids=[f"{op}{form}-{case}".replace(" ", "-") for op, form in FORMS for case in VALUES[op]],
    )
    def test_it_equals_the_float64_loop(self, operators, op, form, case):
        problem, expected = values_case(op, case)
        found = self.results(operators[op], op, problem, None, form)
        is_sensitive = op == "wkv7" and VALUES[op][case].keys == "parallel"
        errors = [relative_error(x.cpu(), y) for x, y in zip(found, expected, strict=True)]
        assert max(errors) < (PARALLEL_KEYS[form] if is_sensitive else self.bound(op, form)), errors

    @pytest.mark.parametrize("head_size", HEAD_SIZES)
    def test_a_packed_row_equals_its_sequences_alone(self, operators, op, form, head_size):
        problem, expected = packed_case(op, head_size)
        found = self.results(operators[op], op, problem, AROUND_CHUNKS, form)
        assert [x.shape for x in found] == [x.shape for x in expected]
        self.assert_close(op, form, found, expected)

    def test_the_gradient_of_a_strong_decay_is_no_difference_of_large_numbers(self, operators, op, form):
        """Far less than the gradients of r and k, whose difference would give it in exact arithmetic."""
        problem = self.problem(operators[op], op, batch=1, n_tokens=70)
        problem.inputs[1][:] = -3e-4
        problem.inputs[1][..., ::2] = -5.0 if op == "wkv7" else -16.0
        expected, _ = self.expected(operators[op], op, problem)
        found = self.results(operators[op], op, problem, None, form)
        dw = 2 + 1
        assert relative_error(found[dw][..., ::2].cpu(), expected[dw][..., ::2]) < self.bound(op, form)

    def test_small_gradients_are_as_exact_as_large_ones(self, operators, op, form):
        """Those of a mean over many tokens are; and factors that fall with the decay must not end them."""
        problem, expected = values_case(op, "fast decay")
        scale = 2.0**-60
        small = problem._replace(dy=problem.dy * scale, d_final=problem.d_final * scale)
        found = self.results(operators[op], op, small, None, form)
        self.assert_close(op, form, [x.double() / scale for x in found[2:]], expected[2:])

    @pytest.mark.parametrize("w", [-6.0, -20.0, -1000.0])
    def test_decays_that_no_rwkv7_has_give_no_wrong_number(self, operators, w):
        """It divides by the decay since the start of a chunk; what that cannot give is inf or NaN."""
        problem = self.problem(operators["wkv7"], "wkv7", n_tokens=70)
        problem.inputs[1][:] = w
        expected, _ = self.expected(operators["wkv7"], "wkv7", problem)
        found = self.results(operators["wkv7"], "wkv7", problem, None, "_chunked_whole")
        for x, y in zip(found, expected, strict=True):
            there = x.isfinite().cpu()
            assert not there.all()
            assert relative_error(x.cpu()[there], y[there]) < REALISTIC

    # ---- the form that chooses

    def test_short_sequences_stay_whole(self, operators, op):
        problem = self.problem(operators[op], op, [70, 0, 5])
        found, whole = (
            self.results(operators[op], op, problem, [70, 0, 5], form)
            for form in ("_chunked", "_chunked_whole")
        )
        assert all(torch.equal(x, y) for x, y in zip(found, whole, strict=True))

    def test_a_long_one_is_cut_into_segments(self, operators, op):
        """Which is seen by its bits: sums are rounded elsewhere."""
        problem = self.problem(operators[op], op, batch=1, n_tokens=LONG)
        found, whole = (
            self.results(operators[op], op, problem, None, form) for form in ("_chunked", "_chunked_whole")
        )
        self.assert_alike(op, "_chunked", found, whole)
        y, dr = 0, 2
        assert not torch.equal(found[y], whole[y])
        assert not torch.equal(found[dr], whole[dr])

    # ---- dtypes

    def test_float32_is_rounded_to_bfloat16_before_it_is_read(self, operators, op):
        problem = self.problem(operators[op], op)
        wide = type(problem)(tuple(x.float() for x in problem.inputs), problem.dy.float(), problem.d_final)
        found, expected = (self.results(operators[op], op, x, None) for x in (wide, problem))
        assert all(x.dtype == torch.float32 for x in found)
        assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(found, expected, strict=True))

    @pytest.mark.parametrize(
        ("dtype", "head_size"),
        [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 32), (torch.bfloat16, 96)],
        ids=["fp32", "fp16", "heads-of-32", "heads-of-96"],
    )
    def test_what_it_is_not_for_is_refused(self, op, form, dtype, head_size):
        kernel = self.kernels[op, form]
        n_inputs = len(kernel.signature.inputs)
        for name, n_addresses in (("forward", n_inputs + 5), ("backward", 2 * n_inputs + 4)):
            function = getattr(kernel.load(), f"rwkv_{op}_{name}{form}")
            invalid_value = 1
            code = function(DTYPE_CODES[dtype], 1, 1, 1, head_size, *(None,) * n_addresses, None)
            assert code == invalid_value

    def test_a_step_equals_forward(self, operators, op, form):
        """Without gradients one token takes the kernel for decoding; with them it takes that for any length."""
        problem = self.here(self.problem(operators[op], op, batch=3, n_tokens=1))
        step = operators[op].run(*problem.inputs, PLAIN, backend=self.backend(op, form))
        leaves = [x.clone().requires_grad_() for x in problem.inputs]
        forward = operators[op].run(*leaves, PLAIN, backend=self.backend(op, form))
        self.assert_alike(op, form, forward, step)

    # ---- memory

    @pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
    @pytest.mark.parametrize("lengths", list(ROWS.values()), ids=list(ROWS))
    def test_it_writes_all_of_its_outputs_and_nothing_else(self, operators, op, form, size, lengths):
        starts = None if len(set(lengths)) == 1 else boundaries(lengths).to(self.device)
        outputs = self.call_with_guards(operators[op], op, form, size, lengths, starts, torch.bfloat16)
        for output in outputs:
            assert output.isfinite().all()

    @pytest.mark.parametrize("starts", [[0, 80, 7, 75], [-5, 20, 40, 1 << 40], [75, 75, 0, 0]], ids=str)
    def test_wrong_boundaries_never_lead_out_of_the_tensors(self, operators, op, form, starts):
        """Python cannot look at them without waiting for the GPU."""
        size, lengths = (1, 64), [25, 25, 25]
        starts = torch.tensor(starts, device=self.device)
        self.call_with_guards(operators[op], op, form, size, lengths, starts, torch.bfloat16)
