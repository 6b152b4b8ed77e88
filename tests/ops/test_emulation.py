"""The portable layer of the CUDA kernels does what CUDA documents, in the emulation and on a GPU; the emulation also
finds mistakes that a GPU would hide.
"""

import ctypes
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from rwkv_train.assets import find_asset_folder

KERNELS = Path(__file__).parent / "kernels"
EMULATED = (
    "g++ -std=c++17 -O2 -march=native -Wall -Wextra -Werror -Wno-unknown-pragmas -DRWKV_EMULATED -x c++ -fPIC -shared "
    "-fvisibility=hidden"
)
ON_GPU = "nvcc -std=c++17 -O3 -arch=native --shared -Xcompiler -fPIC,-fvisibility=hidden -Werror all-warnings"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAUNCH_FAILED = 719


class Library:
    """Small kernels by name; tensors are passed by address."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self._functions = ctypes.CDLL(str(path))
        self._functions.explain.restype = ctypes.c_char_p

    def code(self, kernel: str, *arguments) -> int:
        converted = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        return getattr(self._functions, f"run_{kernel}")(*converted)

    def error(self, code: int) -> str:
        return self._functions.explain(code).decode()

    def run(self, kernel: str, *arguments) -> None:
        code = self.code(kernel, *arguments)
        assert code == 0, self.error(code)

    def set_order(self, order: int) -> None:
        self._functions.rwkv_emulation_order(ctypes.c_uint64(order))


def _build(command: str, name: str, folder: Path) -> Path:
    library = folder / f"{name}.so"
    parts = [*command.split(), str(KERNELS / f"{name}.cu"), "-I", str(find_asset_folder("cuda") / "common")]
    done = subprocess.run([*parts, "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="module", params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def layer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    if request.param == "gpu":
        return Library(_build(ON_GPU, "portable_layer", folder), "cuda")
    return Library(_build(EMULATED, "portable_layer", folder), "cpu")


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    return Library(_build(EMULATED, "mistakes", tmp_path_factory.mktemp("kernels")), "cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------- threads


def test_every_thread_of_every_block_runs_once_with_its_indices(layer):
    grid, block = (3, 2, 2), (5, 3, 4)
    out = torch.full((12 * 60, 6), -1, dtype=torch.int32, device=layer.device)
    layer.run("write_indices", out, *grid, *block)

    # x is the fastest index, as CUDA numbers threads
    expected = torch.cartesian_prod(*(torch.arange(n) for n in (*grid[::-1], *block[::-1])))
    torch.testing.assert_close(out.cpu().long(), expected[:, [2, 1, 0, 5, 4, 3]])


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_threads_add_up_through_shuffles_and_shared_memory(layer, threads):
    x = random(7, 1000).to(layer.device)
    sums = torch.full((7,), torch.nan, device=layer.device)
    layer.run("sum_rows", x, sums, *x.shape, threads, 4 * threads // 32)
    torch.testing.assert_close(sums.double(), x.double().sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_barriers_hold_all_threads_together(layer, threads):
    ring = torch.arange(threads, dtype=torch.int32, device=layer.device)
    layer.run("rotate", ring, threads, 37)
    torch.testing.assert_close(ring.cpu().long(), (torch.arange(threads) + 37) % threads)


@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize("by", [1, 3, 7, 16])
def test_shuffles_read_the_lanes_that_cuda_documents(layer, by, width):
    x = random(32)
    out = torch.zeros(4, 32, device=layer.device)
    layer.run("shuffle", x.to(layer.device), out, by, width)

    lane = torch.arange(32)
    start = lane // width * width
    source = torch.stack((lane ^ by, lane - by, lane + by, start + by % width))
    keeps_own = torch.stack(
        (lane ^ by >= start + width, lane - by < start, lane + by >= start + width, lane < 0)
    )
    torch.testing.assert_close(out.cpu(), x[torch.where(keeps_own, lane, source)])


# -------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reading_a_16_bit_float_is_exact(layer, dtype):
    every = torch.arange(-(2**15), 2**15).short().view(dtype).to(layer.device)
    out = torch.zeros(2**16, device=layer.device)
    layer.run("convert", every, CODES[dtype], out, 0, 2**16)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)


def _floats_near_every_rounding(dtype):
    """Every number of the dtype, what lies halfway to the next one, and the floats around both."""
    every = torch.arange(2**15).short().view(dtype).float()
    halfway = every[:-1].double().add(every[1:].double()).div(2).float()
    floats = torch.cat(
        (every, halfway[halfway.isfinite()], random(1000) * 1e-6, torch.tensor([65519.99, 65520]))
    )
    bits = floats.view(torch.int32)
    # Steps of a float's last bit keep infinity out of NaN and zero out of -1.
    around = torch.cat([(bits + step).clamp(0, 0x7F800000).view(torch.float32) for step in (-1, 0, 1)])
    return torch.cat((around, -around, torch.tensor([torch.nan, torch.inf, -torch.inf])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_writing_a_16_bit_float_rounds_to_nearest_even(layer, dtype):
    x = _floats_near_every_rounding(dtype).to(layer.device)
    out = torch.zeros(len(x), dtype=dtype, device=layer.device)
    layer.run("convert", x, 0, out, CODES[dtype], len(x))

    expected = x.to(dtype)
    torch.testing.assert_close(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert (out.view(torch.int16) == expected.view(torch.int16))[numbers].all()


def test_a_pair_of_numbers_is_packed_lower_half_first(layer):
    pairs = random(64, 2)
    out = torch.zeros(64, 2, dtype=torch.int32, device=layer.device)
    layer.run("pack", pairs.to(layer.device), out, 64)
    expected = torch.stack(
        [pairs.to(dtype).view(torch.int32)[:, 0] for dtype in (torch.bfloat16, torch.float16)], 1
    )
    torch.testing.assert_close(out.cpu(), expected)


def test_tf32_keeps_ten_bits_and_rounds_ties_away_from_zero(layer):
    one = 0x3F800000  # the bits of 1.0; the last of the ten bits is worth 0x2000
    bits = torch.tensor(
        [one, one + 0xFFF, one + 0x1000, one + 0x1FFF, one + 0x3000, 0x7F800000], dtype=torch.int32
    )
    x = torch.cat((bits.view(torch.float32), -bits.view(torch.float32), torch.zeros(20))).to(layer.device)
    out = torch.full((32,), -1, dtype=torch.int32, device=layer.device)
    layer.run("round_to_tf32", x, out, 32)

    rounded = torch.tensor(
        [one, one, one + 0x2000, one + 0x2000, one + 0x4000, 0x7F800000], dtype=torch.int32
    )
    expected = torch.cat((rounded.view(torch.float32), -rounded.view(torch.float32), torch.zeros(20)))
    torch.testing.assert_close(out.cpu().view(torch.float32), expected, rtol=0, atol=0)


def roughly(layer, x):
    out = torch.zeros(len(x), 2, device=layer.device)
    layer.run("roughly", x.to(layer.device), out, len(x))
    return out.cpu().T


def test_rough_functions_are_as_near_as_16_bits_need(layer):
    x = torch.cat((torch.linspace(-87.3, 88.7, 352), torch.logspace(-37.9, 37.9, 352)))
    exp, inverse = roughly(layer, x)

    exact = x.double()[:352]
    assert ((exp[:352].double() / exact.exp() - 1).abs() <= 2**-22 + exact.abs() * 2**-24).all()
    assert ((inverse[352:].double() * x.double()[352:] - 1).abs() <= 2**-23).all()


def test_rough_functions_end_where_their_inverse_does(layer):
    """What is too small for a float32 of full precision is 0 for both, so that no product is a wrong number."""
    infinity = float("inf")
    exp, _ = roughly(layer, torch.tensor([-87.4, -100.0, -infinity, 89.0] * 8))
    assert exp[:4].tolist() == [0, 0, 0, infinity]
    _, inverse = roughly(layer, torch.tensor([2**-126, 1e-38, 0.0, infinity] * 8))
    assert inverse[:4].tolist() == [2**126, infinity, infinity, 0]


# -------------------------------------------------------------------------------------------- tensor cores


def _places(dtype):
    """Row and column of element i of every lane's fragments of a, b and c, as the PTX manual gives them.

    Each is ``[32, elements]``.
    """
    lane = torch.arange(32)[:, None]
    group, in_group = lane // 4, lane % 4

    i = torch.arange(4)
    c = (torch.where(i < 2, group, group + 8), in_group * 2 + (i & 1))
    if dtype == torch.float32:  # tf32, m16n8k8
        a = (torch.where(i % 2 == 0, group, group + 8), torch.where(i < 2, in_group, in_group + 4))
        i = torch.arange(2)
        b = (torch.where(i == 0, in_group, in_group + 4), group.expand(32, 2))
    else:  # m16n8k16
        b = (in_group * 2 + (i & 1) + torch.where(i >= 2, 8, 0), group.expand(32, 4))
        i = torch.arange(8)
        upper = (i < 2) | ((i >= 4) & (i < 6))
        a = (torch.where(upper, group, group + 8), in_group * 2 + (i & 1) + torch.where(i >= 4, 8, 0))
    return a, b, c


@pytest.mark.parametrize("dtype", list(CODES), ids=str)
def test_a_product_of_fragments_is_the_product_of_their_matrices(layer, dtype):
    depth = 8 if dtype == torch.float32 else 16
    a, b, c = random(16, depth), random(depth, 8, seed=1), random(16, 8, seed=2)
    if dtype == torch.float32:
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))  # as tf32 has them
    a, b = a.to(dtype), b.to(dtype)
    place_a, place_b, place_c = _places(dtype)

    fragments = [x[place].view(torch.int32).to(layer.device) for x, place in ((a, place_a), (b, place_b))]
    sums = c[place_c].to(layer.device)
    layer.run("multiply_fragments", CODES[dtype], *fragments, sums)

    product = c.double() + a.double() @ b.double()
    torch.testing.assert_close(sums.cpu().double(), product[place_c], rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["as-they-lie", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_read_from_shared_memory_into_fragments(layer, count, transposed):
    x = torch.arange(32 * 8, dtype=torch.int16)
    registers = torch.zeros(32, count, dtype=torch.int32, device=layer.device)
    layer.run("read_matrices", x.to(layer.device), registers, count, int(transposed))

    matrices = x.view(4, 8, 8)[:count]
    if transposed:
        matrices = matrices.mT
    lane = torch.arange(32)
    pairs = torch.stack([matrices[:, lane // 4, lane % 4 * 2 + half] for half in (0, 1)], dim=-1)
    torch.testing.assert_close(registers.cpu(), pairs.transpose(0, 1).contiguous().view(torch.int32)[..., 0])


@pytest.mark.parametrize("shape", [(16, 16, 32), (48, 80, 64)], ids=str)
def test_a_pipeline_of_copies_and_products_multiplies_matrices(layer, shape):
    m, k, n = shape
    x, y = random(m, k).bfloat16().to(layer.device), random(k, n, seed=1).bfloat16().to(layer.device)
    out = torch.full((m, n), torch.nan, device=layer.device)
    layer.run("multiply", x, y, out, m, k, n)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_bytes", [4, 8, 16])
def test_an_asynchronous_copy_brings_bytes_or_zeros(layer, n_bytes):
    x = torch.arange(1, 32 * n_bytes // 4 + 1, dtype=torch.int32, device=layer.device)
    out = torch.full_like(x, -1)
    layer.run("copy", x, out, n_bytes)
    wanted = torch.arange(32, device=layer.device)[:, None] % 2 == 0
    torch.testing.assert_close(out.view(32, -1), x.view(32, -1) * wanted)


# -------------------------------------------------------------------------------------------- refused launches


@pytest.mark.parametrize(
    ("rows", "threads", "shared_bytes"),
    [(1, 2048, 256), (0, 32, 16), (1, 32, 300_000)],
    ids=["too many threads", "no block", "too much shared memory"],
)
def test_an_impossible_launch_returns_an_error(layer, rows, threads, shared_bytes):
    x = random(1, 32).to(layer.device)
    code = layer.code("sum_rows", x, torch.zeros_like(x), rows, 32, threads, shared_bytes)
    assert code != 0
    assert layer.error(code)

    layer.run("sum_rows", x, torch.zeros_like(x), 1, 32, 32, 16)  # and harms none that follows


# -------------------------------------------------------------------------------------------- mistakes


def _out():
    return torch.zeros(64)


MISTAKES = {
    "some_return_before_a_barrier": ((), r"block \(0, 0, 0\): __syncthreads was reached by 59 of 64 threads"),
    "a_barrier_for_one_warp": ((), "reached by 32 of 64"),
    "lanes_that_do_not_come": ((_out,), "lane 0 of warp 0 waits .* for lanes 16, 17,"),
    "different_masks": ((_out,), "lanes 0 and 16 of warp 0 meet with different masks"),
    "different_operations": (
        (_out,),
        "lanes 0 and 3 of warp 0 meet with different masks, or in different op",
    ),
    "outside_of_its_own_mask": ((_out,), "lane 16 is not in the mask"),
    "from_a_lane_outside_of_the_mask": ((_out,), "lane 0 shuffles from lane 16"),
    "wrong_address": (
        (lambda: None,),
        r"block \(2, 0, 0\): thread \(7, 0, 0\) reads or writes an address out of",
    ),
    "too_deep": ((_out, lambda: 1000), "64 KB of stack"),
    "not_aligned": ((_out,), "cp.async at an address that is not a multiple of 16"),
    "copies_too_far": ((_out,), "cp.async at byte 256 of 256"),
}


@pytest.mark.parametrize("kernel", list(MISTAKES))
def test_a_mistake_is_named_with_its_kernel_and_block(mistakes, kernel):
    arguments, message = MISTAKES[kernel]
    code = mistakes.code(kernel, *(make() for make in arguments))
    assert code == LAUNCH_FAILED
    error = mistakes.error(code)
    assert error.startswith(f"emulation: kernel {kernel}, block (")
    assert re.search(message, error)


@pytest.mark.parametrize("at", [-1, -900, 64, 100, 20_000])
def test_writing_beyond_the_shared_memory_is_found(mistakes, at):
    assert mistakes.code("writes_shared_memory_at", at) == LAUNCH_FAILED


def test_reading_beyond_the_shared_memory_is_found_where_it_happens(mistakes):
    code = mistakes.code("reads_shared_memory_at", 64, _out())
    assert "thread (0, 0, 0) reads or writes byte 256 of 256 bytes" in mistakes.error(code)


def test_shared_memory_holds_nothing_that_a_kernel_could_count_on(mistakes):
    out = _out()
    for at in (0, 63):
        mistakes.run("reads_shared_memory_at", at, out)
        assert out[0].isnan()


@pytest.mark.parametrize(("order", "distance"), [(0, 1), (1, -1)], ids=["ascending", "descending"])
def test_one_of_two_orders_shows_a_missing_barrier(mistakes, order, distance):
    out = _out()
    mistakes.set_order(order)
    mistakes.run("no_barrier", out, distance)
    mistakes.set_order(0)
    assert out.isnan().any()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_blocks_run_in_any_order_that_is_asked_for(mistakes, order):
    ranks = {}
    for asked in (0, order):
        ranks[asked] = torch.full((40,), -1, dtype=torch.int32)
        mistakes.set_order(asked)
        mistakes.run("counts_blocks", torch.zeros(1, dtype=torch.int32), ranks[asked], 40)
    mistakes.set_order(0)

    torch.testing.assert_close(ranks[0], torch.arange(40, dtype=torch.int32))
    torch.testing.assert_close(ranks[order].sort().values, ranks[0])
    assert (ranks[order] != ranks[0]).any()


@pytest.mark.parametrize("commits", [0, 1], ids=["not committed", "waits for too few"])
def test_an_asynchronous_copy_that_is_not_waited_for_does_not_arrive(mistakes, commits):
    out = _out()
    mistakes.run("does_not_wait", torch.ones(64), out, commits)
    assert out.isnan().all()


# -------------------------------------------------------------------------------------------- the emulation itself


def test_the_portable_switch_of_fibers_does_the_same(tmp_path):
    library = Library(_build(f"{EMULATED} -DRWKV_EMULATION_PORTABLE", "portable_layer", tmp_path), "cpu")
    test_barriers_hold_all_threads_together(library, 96)
    test_threads_add_up_through_shuffles_and_shared_memory(library, 64)


def test_launches_from_several_threads_wait_for_each_other(layer):
    failures: list[AssertionError] = []

    def run():
        try:
            for _ in range(20):
                test_barriers_hold_all_threads_together(layer, 96)
        except AssertionError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
