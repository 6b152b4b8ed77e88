"""Which problems are timed."""

import pytest

from rwkv_train.benchmarks.kernel_sizes import CPU_SIZES, GPU_SIZES, KernelSize, choose_sizes
from rwkv_train.errors import ConfigError
from rwkv_train.ops.prepare import OPERATORS


@pytest.mark.parametrize("sizes", [CPU_SIZES, GPU_SIZES], ids=["cpu", "gpu"])
def test_every_operator_has_usual_sizes(sizes):
    assert {size.op for size in sizes} == set(OPERATORS)
    assert {size.op for size in sizes if size.packed} == set(OPERATORS)


def test_the_usual_sizes_hold_the_ones_that_the_goals_are_stated_for():
    assert KernelSize("wkv7", B=4, T=512, H=12, N=64) in CPU_SIZES
    for op in ("wkv7", "wkv6", "wkv5"):
        assert KernelSize(op, B=8, T=4096, H=32, N=64) in GPU_SIZES
        assert KernelSize(op, B=1, T=32768, H=12, N=64) in GPU_SIZES
    assert KernelSize("wkv4", B=8, T=4096, H=1, N=2048) in GPU_SIZES
    assert any(size.N == 128 and size.op == "wkv7" for size in GPU_SIZES)


def test_nothing_chosen_is_all_that_is_usual_on_the_device():
    assert choose_sizes("cpu") == CPU_SIZES
    assert choose_sizes("cuda") == GPU_SIZES


def test_an_operator_chosen_leaves_the_others_out():
    assert {size.op for size in choose_sizes("cpu", ["wkv7", "wkv4"])} == {"wkv7", "wkv4"}


def test_a_size_stands_for_every_operator_and_wkv4_takes_its_width():
    assert choose_sizes("cuda", None, ["B8T4096H32N64"]) == (
        KernelSize("wkv7", 8, 4096, 32, 64),
        KernelSize("wkv6", 8, 4096, 32, 64),
        KernelSize("wkv5", 8, 4096, 32, 64),
        KernelSize("wkv4", 8, 4096, 1, 2048),
    )


def test_a_size_may_be_packed_and_be_for_chosen_operators():
    found = choose_sizes("cuda", ["wkv6"], ["B2T3H4N8-packed", "B2T3H4N8"])
    assert found == (KernelSize("wkv6", 2, 3, 4, 8, packed=True), KernelSize("wkv6", 2, 3, 4, 8))


def test_a_size_without_heads_is_for_wkv4_alone():
    assert choose_sizes("cuda", None, ["B2T3C40"]) == (KernelSize("wkv4", 2, 3, 1, 40),)


@pytest.mark.parametrize("size", [*CPU_SIZES, *GPU_SIZES], ids=lambda size: f"{size.op} {size.label}")
def test_a_label_names_its_size(size):
    assert choose_sizes("cpu", [size.op], [size.label]) == (size,)


@pytest.mark.parametrize(
    ("ops", "labels", "sentence"),
    [
        (["wkv9"], None, "--op wkv9: there is no such operator; choose one of wkv4, wkv5, wkv6, wkv7"),
        (None, ["8x4096"], "--size 8x4096: wanted B8T4096H32N64"),
        (None, ["B8T4096"], "--size B8T4096: wanted B8T4096H32N64"),
        (None, ["B0T4096H32N64"], "--size B0T4096H32N64: wanted B8T4096H32N64"),
        (["wkv7"], ["B8T4096C2048"], "--size B8T4096C2048 is for wkv4"),
    ],
    ids=["op", "form", "no width", "no rows", "no heads"],
)
def test_what_is_no_size_is_refused(ops, labels, sentence):
    with pytest.raises(ConfigError, match=sentence):
        choose_sizes("cpu", ops, labels)


def test_packed_sequences_halve_down_to_one_token():
    assert KernelSize("wkv7", B=2, T=9, H=1, N=8, packed=True).starts == [0, 9, 14, 16, 17, 18]
    assert KernelSize("wkv7", B=2, T=9, H=1, N=8).starts == [0, 9, 18]
