"""The command that measures the errors of the CUDA kernels: what its rows say."""

import pytest
import torch

from tests.ops.chunked_cases import CASES, make_problem
from tests.ops.emulated import KERNELS
from tests.ops.kernel_errors import SENSITIVITY, as_markdown, errors_by_name, measure, perturbed

HALF_A_STEP = 2.0**-8
"""Of a bfloat16 number, relative to the smallest of its exponent."""


@pytest.fixture(scope="module")
def rows():
    return list(measure("wkv6", "unbounded decay", 40, 1, KERNELS, "cpu"))


def test_the_exact_kernel_is_off_by_one_rounding_of_its_outputs(rows):
    (exact,) = (row["errors"] for row in rows if row["precision"] == "cuda_exact")
    assert all(1e-3 < exact[name] < 2.5e-3 for name in ("y", "dr", "dk", "dv", "du"))
    assert all(exact[name] < 1e-5 for name in ("final", "dw", "dstate", "w dw, strong w"))


def test_there_is_a_row_for_each_kernel_and_one_for_the_inputs(rows):
    assert [row["precision"] for row in rows] == ["cuda_exact", SENSITIVITY]
    assert {(row["op"], row["case"], row["T"], row["H"], row["N"]) for row in rows} == {
        ("wkv6", "unbounded decay", 40, 1, 64)
    }


def test_what_moves_inputs_is_what_rounding_takes_away():
    problem = make_problem("wkv7", CASES["wkv7"]["realistic"], 50)
    moved = perturbed(problem)
    for x, y in zip((*problem.inputs, problem.dy), (*moved.inputs, moved.dy), strict=True):
        off = (y - x.double()).abs() / x.double().abs().clamp_min(1e-30)
        if x.dtype == torch.bfloat16:
            assert off.max() <= HALF_A_STEP
            assert off.max() > 0.9 * HALF_A_STEP
        else:
            assert off.max() == 0


def test_an_output_that_is_not_finite_is_told_and_hides_no_other():
    problem = make_problem("wkv7", CASES["wkv7"]["realistic"], 2)
    expected = [problem.dy, problem.d_final, *problem.inputs]
    found = [x.clone() for x in expected]
    found[0][0, 0, 0, 0] = torch.nan
    found[2] *= 2
    errors = errors_by_name("wkv7", problem, found, expected)
    assert errors["y"] is None
    assert errors["dr"] == 1.0
    assert errors["dk"] == 0.0

    table = as_markdown([{"op": "wkv7", "case": "realistic", "precision": "cuda", "errors": errors}])
    assert table.splitlines()[-1].startswith("| realistic | cuda | not finite | 0.0 | 1000.0 |")
