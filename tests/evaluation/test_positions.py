import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.positions import PositionSums, require_power_of_two


def sums_of(documents):
    sums = PositionSums()
    for losses in documents:
        sums.add(np.array(losses, dtype=np.float32), 0)
    return sums


def test_buckets_end_at_powers_of_two():
    curve = sums_of([range(1, 20)]).curve(16)
    assert [bucket.label for bucket in curve.buckets] == ["1", "2", "3-4", "5-8", "9-16"]
    # The loss at position n is n: means of 1; 2; 3, 4; 5 to 8; 9 to 16.
    assert [bucket.loss for bucket in curve.buckets] == [1, 2, 3.5, 6.5, 12.5]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8), power=st.integers(0, 6))
def test_a_curve_is_of_the_documents_that_reach_its_end(lengths, power):
    random = np.random.default_rng(len(lengths))
    documents = [random.random(n).astype(np.float32) for n in lengths]
    min_length = 2**power
    curve = sums_of(documents).curve(min_length)

    long = [losses for losses in documents if len(losses) >= min_length]
    assert curve.documents == len(long)
    assert curve.buckets[-1].last == min_length
    for bucket in curve.buckets:
        values = [
            losses[position - 1] for losses in long for position in range(bucket.first, bucket.last + 1)
        ]
        assert bucket.tokens == len(values)
        assert bucket.loss == (pytest.approx(np.mean(values, dtype=float)) if values else None)


def test_curves_are_told_for_every_length():
    curves = sums_of([[1.0] * 9, [2.0] * 2]).curves()
    assert [(curve.min_length, curve.documents) for curve in curves] == [(1, 2), (2, 2), (4, 1), (8, 1)]
    assert curves[1].to_json() == {
        "min_length": 2,
        "documents": 2,
        "buckets": [
            {"first": 1, "last": 1, "tokens": 2, "loss": 1.5},
            {"first": 2, "last": 2, "tokens": 2, "loss": 1.5},
        ],
    }
    assert PositionSums().curves() == []


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([100], 64), ([64] * 9 + [1000], 512), ([64] * 11 + [1000], 64), ([1], 1), ([], 1)],
)
def test_a_curve_is_usually_as_long_as_one_document_in_ten(lengths, expected):
    assert sums_of([[0.0] * n for n in lengths]).usual_length() == expected


@pytest.mark.parametrize(("length", "right"), [(0, "1 or 2"), (3, "2 or 4"), (1000, "512 or 1024")])
def test_a_length_at_which_no_bucket_ends_is_refused(length, right):
    with pytest.raises(ConfigError, match=f"--min-length is {length}; it must be a power of two.*{right}"):
        require_power_of_two(length)


@pytest.mark.parametrize("length", [1, 2, 4096])
def test_a_power_of_two_is_taken(length):
    require_power_of_two(length)
