"""Timing the recurrences: what the rows say."""

import pytest

from rwkv_train.benchmarks.kernels import STANDARD_SIZES, KernelSize, bench_kernels
from rwkv_train.errors import BackendError
from rwkv_train.ops.prepare import OPERATORS

SMALL = (
    KernelSize("wkv7", B=1, T=9, H=2, N=8),
    KernelSize("wkv7", B=2, T=9, H=2, N=8, packed=True),
    KernelSize("wkv6", B=1, T=9, H=2, N=8),
    KernelSize("wkv5", B=1, T=9, H=2, N=8),
    KernelSize("wkv4", B=1, T=9, H=1, N=16, packed=True),
)


def test_there_is_a_row_for_each_size_backend_and_pass():
    rows = bench_kernels(SMALL, ("cpp", "torch"), repeats=3)
    found = [(row["op"], row["N"], row["packed"], row["backend"], row["pass"]) for row in rows]
    sizes = [
        ("wkv7", 8, False),
        ("wkv7", 8, True),
        ("wkv6", 8, False),
        ("wkv5", 8, False),
        ("wkv4", 16, True),
    ]
    expected = [
        (*size, backend, kind)
        for size in sizes
        for backend in ("cpp", "torch")
        for kind in ("forward", "forward+backward")
    ]
    assert found == expected
    assert all(0 < row["min_ms"] <= row["ms"] for row in rows)


def test_auto_is_reported_under_the_name_it_stands_for_and_timed_once():
    rows = bench_kernels(SMALL[:1], ("auto", "cpp"), repeats=1)
    assert [row["backend"] for row in rows] == ["cpp", "cpp"]
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]


def test_a_backend_that_cannot_run_is_refused():
    with pytest.raises(BackendError, match="no backend 'fast'"):
        bench_kernels(SMALL, ("fast",), repeats=1)


def test_an_unknown_operator_is_refused():
    with pytest.raises(BackendError, match="no operator 'wkv9'; choose one of wkv4, wkv5, wkv6, wkv7"):
        bench_kernels((KernelSize("wkv9", 1, 1, 1, 1),), repeats=1)


def test_every_operator_has_usual_sizes():
    assert {size.op for size in STANDARD_SIZES} == set(OPERATORS)


def test_the_usual_sizes_hold_the_one_that_the_goal_is_stated_for():
    assert KernelSize("wkv7", B=4, T=512, H=12, N=64) in STANDARD_SIZES
