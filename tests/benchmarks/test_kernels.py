"""Timing the recurrences: what the rows say."""

import itertools

import pytest
import torch

from rwkv_train.benchmarks.kernel_inputs import make_inputs
from rwkv_train.benchmarks.kernel_peers import Peer
from rwkv_train.benchmarks.kernel_sizes import KernelSize
from rwkv_train.benchmarks.kernels import N_WARM_UP, bench_kernels, default_backends, problem_of_size
from rwkv_train.benchmarks.machine_limits import MachineLimits
from rwkv_train.errors import BackendError, ConfigError
from rwkv_train.ops.backends import problem_of
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.ops.prepare import OPERATORS
from rwkv_train.ops.wkv7 import wkv7

SMALL = (
    KernelSize("wkv7", B=1, T=9, H=2, N=8),
    KernelSize("wkv7", B=2, T=9, H=2, N=8, packed=True),
    KernelSize("wkv6", B=1, T=9, H=2, N=8),
    KernelSize("wkv5", B=1, T=9, H=2, N=8),
    KernelSize("wkv4", B=1, T=9, H=1, N=16, packed=True),
)
PLAIN_WKV7, PACKED_WKV7 = SMALL[:2]


def stopped_watch(*seconds):
    """A stopwatch that makes the call and reads off what it is told to."""
    readings = itertools.cycle(seconds or (1.0,))

    def seconds_of(call):
        call()
        return next(readings)

    return seconds_of


def bench(sizes, backends=("reference",), repeats=1, **options):
    return bench_kernels(sizes, backends, repeats, stopwatch=stopped_watch(), **options)


def peer_of(change=lambda y: y, name="peer"):
    """Our reference, as somebody else's function, with y changed."""

    def function(r, w, k, v, a, b, cu_seqlens=None):
        context = PLAIN if cu_seqlens is None else packed_context(cu_seqlens)
        y, state = wkv7(r, w, k, v, a, b, None, context, backend="reference")
        return change(y), state

    return Peer(name, "wkv7", function)


def test_there_is_a_row_for_each_size_backend_and_pass():
    rows = bench(SMALL, ("cpp", "torch"))
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


def test_the_clock_of_the_machine_runs():
    rows = bench_kernels(SMALL[:1], ("reference",), repeats=3)
    assert all(0 < row["min_ms"] <= row["ms"] for row in rows)


def test_median_and_least_time_are_those_of_the_calls_that_took_turns():
    # Turns of two passes: 3, 5 and 4 seconds forward, 30, 70 and 50 with backward.
    watch = stopped_watch(3, 30, 5, 70, 4, 50)
    rows = bench_kernels(SMALL[:1], ("reference",), repeats=3, stopwatch=watch)
    assert [(row["ms"], row["min_ms"]) for row in rows] == [(4000, 3000), (50_000, 30_000)]


def test_rates_are_counts_over_the_median_time_and_parts_of_the_limits():
    # 1,000 tokens of one head of 64: 1,000 x 64 x (6 + 1) x 4 bytes and the final state's 64 x 64 x 4;
    # 1,000 x 9 x 64 x 64 operations.
    size = KernelSize("wkv7", B=1, T=1000, H=1, N=64)
    limits = MachineLimits(copy_bytes_per_second=18_083_840, matmul_operations_per_second=368_640_000)
    watch = stopped_watch(0.5)
    forward, _ = bench_kernels([size], ("cpp",), 1, limits=limits, stopwatch=watch)
    assert (forward["bytes"], forward["operations"]) == (1_808_384, 36_864_000)
    assert (forward["gb_per_second"], forward["gflop_per_second"]) == (0.004, 0.074)
    assert (forward["of_copy"], forward["of_matmul"]) == (0.2, 0.2)


def test_without_limits_no_part_of_one_is_told():
    assert {(row["of_copy"], row["of_matmul"]) for row in bench(SMALL[:1])} == {(None, None)}


def test_on_a_cpu_memory_is_not_told():
    assert {row["peak_bytes"] for row in bench(SMALL[:1])} == {None}


def test_auto_is_reported_under_the_name_it_stands_for_and_timed_once():
    rows = bench(SMALL[:1], ("auto", "cpp"))
    assert [row["backend"] for row in rows] == ["cpp", "cpp"]
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]


@pytest.mark.parametrize("op", list(OPERATORS))
def test_all_backends_of_a_device_but_the_loop_are_measured_the_exact_one_first(op):
    size = KernelSize(op, B=8, T=4096, H=1 if op == "wkv4" else 32, N=64)
    assert default_backends(size, torch.device("cpu"), torch.float32) == ["torch", "cpp"]
    assert default_backends(size, torch.device("cpu"), torch.float64) == ["torch"]
    found = default_backends(size, torch.device("cuda"), torch.bfloat16)
    assert found[0] == "cuda_exact"
    assert sorted(found) == sorted(set(OPERATORS[op]) - {"cpp", "reference"})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (KernelSize("wkv7", B=8, T=16, H=32, N=8), (256, 16)),
        (KernelSize("wkv4", B=2, T=64, H=1, N=48), (128, 64)),
        # In sequences of 9, 5, 2, 1 and 1 tokens.
        (KernelSize("wkv7", B=2, T=9, H=2, N=8, packed=True), (8, 4)),
    ],
    ids=["heads", "no heads", "packed"],
)
def test_auto_chooses_for_the_size_that_is_measured(size, expected):
    problem = problem_of_size(size, torch.device("cpu"), torch.float32)
    assert (problem.n_recurrences, problem.n_tokens) == expected
    inputs = make_inputs(size, torch.device("cpu"), torch.float32)
    v = inputs.tensors[3]
    n_sequences = 5 if size.packed else None
    head_size = None if size.op == "wkv4" else size.N
    assert problem == problem_of(v, head_size, is_packed=size.packed, n_sequences=n_sequences)


def test_backends_agree_within_rounding():
    rows = bench(SMALL, ("reference", "cpp"))
    assert {row["difference"] for row in rows if row["backend"] == "reference"} == {0}
    assert all(0 < row["difference"] < 1e-5 for row in rows if row["backend"] == "cpp")


@pytest.mark.parametrize("size", [PLAIN_WKV7, PACKED_WKV7], ids=["plain", "packed"])
def test_a_peer_stands_beside_ours_on_the_same_inputs(size):
    rows = bench([size], ("cpp",), peers=[peer_of()])
    assert [row["backend"] for row in rows] == ["cpp", "cpp", "peer", "peer"]
    assert all(row["difference"] < 1e-5 and row["ms"] == 1000 for row in rows)


def test_a_wrong_peer_shows():
    rows = bench([PLAIN_WKV7], peers=[peer_of(lambda y: 1.25 * y)])
    assert [row["difference"] for row in rows] == [0, 0, 0.25, 0.25]


def test_a_peer_runs_only_where_its_operator_is_measured():
    assert {row["backend"] for row in bench(SMALL[2:3], peers=[peer_of()])} == {"reference"}


def test_a_peer_is_called_as_often_as_ours():
    called = []
    bench([PLAIN_WKV7], repeats=4, peers=[peer_of(lambda y: called.append(1) or y)])
    assert len(called) == 2 * (N_WARM_UP + 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda y: y[:, 1:], "ValueError: a result has the shape (1, 8, 2, 8), wanted (1, 9, 2, 8)"),
        (lambda y: y.no_such_thing, "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
        (lambda y: y * float("nan"), "a result is not finite"),
    ],
    ids=["shape", "error", "nan"],
)
def test_a_peer_that_fails_says_why_and_ends_nothing(change, sentence):
    rows = bench([PLAIN_WKV7], peers=[peer_of(change, "broken"), peer_of(name="whole")])
    assert next(row["failed"] for row in rows if row["backend"] == "broken") == sentence
    assert {row["failed"] for row in rows if row["backend"] != "broken"} == {None}


class LoseGradient(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * float("nan")


@pytest.mark.parametrize("lost", range(6), ids=["r", "w", "k", "v", "a", "b"])
def test_one_gradient_that_is_not_finite_is_a_failure(lost):
    def function(*inputs):
        changed = [LoseGradient.apply(x) if i == lost else x for i, x in enumerate(inputs)]
        return wkv7(*changed, None, PLAIN, backend="reference")

    forward, backward = bench([PLAIN_WKV7], peers=[Peer("peer", "wkv7", function)])[2:]
    assert (forward["difference"], forward["failed"]) == (0, None)
    assert (backward["difference"], backward["failed"]) == (None, "a result is not finite")


@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("when", [0, N_WARM_UP, N_WARM_UP + 2], ids=["warm-up", "first turn", "last turn"])
def test_a_peer_that_fails_at_some_call_has_no_time_and_ends_nothing(error, when):
    calls = itertools.count()

    def fail_once(y):
        if torch.is_grad_enabled() or next(calls) != when:
            return y
        raise error("enough")

    rows = bench([PLAIN_WKV7], repeats=3, peers=[peer_of(fail_once, "broken"), peer_of(name="whole")])
    broken = next(row for row in rows if row["backend"] == "broken")
    assert (broken["pass"], broken["ms"], broken["failed"]) == ("forward", None, f"{error.__name__}: enough")
    others = [row for row in rows if row is not broken]
    assert [(row["ms"], row["failed"]) for row in others] == [(1000, None)] * 5


def test_ours_without_memory_has_no_time_and_ends_nothing():
    def watch(call):
        if next(calls) == 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return 1.0

    calls = itertools.count()
    forward, backward = bench_kernels([PLAIN_WKV7], ("reference",), 2, stopwatch=watch)
    assert (forward["ms"], backward["ms"]) == (None, 1000)
    assert "can't allocate memory" in forward["failed"]


def test_an_error_of_ours_in_a_turn_is_none_of_a_peer():
    def watch(call):
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        bench_kernels([PLAIN_WKV7], ("reference",), 1, stopwatch=watch)


def double_inputs(r, *_):
    with torch.no_grad():
        r.mul_(2)


def write_past_autograd(r, w, k, v, *_):
    v.data.zero_()  # counted nowhere, like the writes of a kernel


def shrink_inputs(r, *_):
    r.data = r.data[:, :1]


def move_starts(*inputs, cu_seqlens):
    cu_seqlens[1] += 1


def change_and_raise(r, *_):
    double_inputs(r)
    raise ValueError("enough")


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (PLAIN_WKV7, double_inputs),
        (PLAIN_WKV7, write_past_autograd),
        (PLAIN_WKV7, shrink_inputs),
        (PLAIN_WKV7, change_and_raise),
        (PACKED_WKV7, move_starts),
    ],
    ids=["in place", "uncounted", "shape", "error", "starts"],
)
def test_a_peer_that_changes_its_inputs_is_not_timed_and_others_get_them_unchanged(size, change):
    def function(*inputs, **options):
        change(*inputs, **options)
        return inputs[3] * 1, None

    rows = bench([size], ("reference",), peers=[Peer("broken", "wkv7", function), peer_of(name="whole")])
    broken = [row for row in rows if row["backend"] == "broken"]
    assert [(row["ms"], row["failed"]) for row in broken] == [(None, "it changes its inputs")] * 2
    assert [row["difference"] for row in rows if row["backend"] == "whole"] == [0, 0]


def test_a_peer_without_a_backward_is_timed_forward():
    forward, backward = bench([PLAIN_WKV7], peers=[peer_of(torch.Tensor.detach)])[2:]
    assert forward["ms"] == 1000
    assert backward["ms"] is None
    assert "does not require grad" in backward["failed"]


def test_two_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two implementations of wkv7 are called reference"):
        bench([PLAIN_WKV7], peers=[peer_of(name="reference")])


def test_a_backend_that_cannot_run_is_refused():
    with pytest.raises(BackendError, match="no backend 'fast'"):
        bench_kernels(SMALL, ("fast",), repeats=1)


def test_an_unknown_operator_is_refused():
    with pytest.raises(BackendError, match="no operator 'wkv9'; choose one of wkv4, wkv5, wkv6, wkv7"):
        bench_kernels((KernelSize("wkv9", 1, 1, 1, 1),), repeats=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_time_and_memory_are_those_of_the_device():
    rows = bench_kernels(SMALL, ("torch",), repeats=2, device="cuda", dtype=torch.bfloat16)
    assert all(row["peak_bytes"] > 0 and 0 < row["min_ms"] <= row["ms"] for row in rows)
