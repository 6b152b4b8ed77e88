"""Bytes and operations of a recurrence, against numbers counted by hand."""

import pytest

from rwkv_train.benchmarks.kernel_counts import (
    bytes_per_token,
    count_operations,
    minimum_bytes,
    operations_per_token,
)
from rwkv_train.benchmarks.kernel_sizes import KernelSize

BIG = KernelSize("wkv7", B=8, T=4096, H=32, N=64)
STATES_OF_BIG = 8 * 32 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [("wkv7", 7 * 128, 13 * 128), ("wkv6", 5 * 128, 9 * 128), ("wkv5", 4 * 128, 7 * 128)],
    ids=["wkv7", "wkv6", "wkv5"],
)
def test_a_head_of_64_in_bfloat16_moves_128_bytes_a_tensor(op, forward, backward):
    assert bytes_per_token(op, "forward", 64, 2, decay_bytes=2) == forward
    assert bytes_per_token(op, "backward", 64, 2, decay_bytes=2) == backward


def test_a_channel_of_wkv4_moves_three_numbers_and_five():
    assert bytes_per_token("wkv4", "forward", 1, 2) == 6
    assert bytes_per_token("wkv4", "backward", 1, 2) == 10


def test_a_decay_in_float32_costs_twice_its_half():
    assert bytes_per_token("wkv7", "forward", 64, 2) == 6 * 128 + 256
    assert bytes_per_token("wkv7", "backward", 64, 2) == 11 * 128 + 2 * 256


def test_a_large_batch_of_wkv7_moves_almost_a_gigabyte():
    found = minimum_bytes(BIG, "forward", 2, decay_bytes=2)
    assert found == 939_524_096 + STATES_OF_BIG
    assert minimum_bytes(BIG, "forward+backward", 2, decay_bytes=2) == 2_684_354_560 + STATES_OF_BIG


def test_a_large_batch_of_wkv4_moves_three_tensors():
    size = KernelSize("wkv4", B=8, T=4096, H=1, N=2048)
    parameters, states = 2048 * (2 + 4), 8 * 3 * 2048 * 4
    assert minimum_bytes(size, "forward", 2) == 402_653_184 + parameters + states
    assert minimum_bytes(size, "forward+backward", 2) == 1_073_741_824 + 3 * parameters + states


def test_every_packed_sequence_has_a_state():
    # 18 tokens: sequences of 9, 5, 2, 1, 1.
    plain = KernelSize("wkv7", B=1, T=18, H=2, N=8)
    added = 4 * 2 * 8 * 8 * 4
    assert (
        minimum_bytes(plain._replace(packed=True), "forward", 4) == minimum_bytes(plain, "forward", 4) + added
    )


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [("wkv7", 9 * 4096, 26 * 4096), ("wkv6", 5 * 4096, 14 * 4096), ("wkv5", 5 * 4096, 14 * 4096)],
    ids=["wkv7", "wkv6", "wkv5"],
)
def test_operations_of_a_head_of_64_go_with_its_4096_elements(op, forward, backward):
    assert operations_per_token(op, "forward", 64) == forward
    assert operations_per_token(op, "backward", 64) == backward


def test_operations_of_a_large_batch():
    # 1,048,576 tokens of a head, 36,864 and 106,496 operations each.
    assert count_operations(BIG, "forward") == 38_654_705_664
    assert count_operations(BIG, "forward+backward") == 150_323_855_360


def test_operations_of_wkv4_go_with_its_channels():
    size = KernelSize("wkv4", B=2, T=3, H=1, N=5)
    assert count_operations(size, "forward") == 2 * 3 * 5 * 12
    assert count_operations(size, "forward+backward") == 2 * 3 * 5 * (12 + 33)
