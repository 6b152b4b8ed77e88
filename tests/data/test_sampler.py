"""The order of samples: a permutation in each epoch, the same on every machine and for ever."""

import numpy as np
import pytest

from rwkv_train.data.sampler import slot_of_sample

MASK64 = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64 in Python's own integers, from the paper."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def slot_by_the_formula(sample: int, n_slots: int, seed: int) -> int:
    """The formula of the docstring, one number at a time."""
    epoch, slot = divmod(sample, n_slots)
    half = 4
    while 4**half < n_slots:
        half += 1
    key = mix((mix(seed & MASK64) + epoch) & MASK64)
    while True:
        left, right = slot >> half, slot % 2**half
        for i in range(8):
            left, right = right, left ^ (mix((key + 2**32 * (i + 1) + right) & MASK64) % 2**half)
        slot = (left << half) | right
        if slot < n_slots:
            return slot


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("n_slots", [1, 2, 3, 255, 256, 257, 1000, 65_537])
def test_each_epoch_reads_every_slot_once(n_slots, epoch, order):
    samples = np.arange(epoch * n_slots, (epoch + 1) * n_slots)

    slots = slot_of_sample(samples, n_slots, seed=42, order=order)

    assert np.array_equal(np.sort(slots), np.arange(n_slots))


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1, 2**70 + 5])
@pytest.mark.parametrize("n_slots", [1, 3, 1000, 70_001, 2**40 + 1])
def test_arrays_and_single_samples_follow_the_formula(n_slots, seed):
    samples = [0, 1, 2, n_slots - 1, n_slots, 3 * n_slots + n_slots // 2]
    expected = [slot_by_the_formula(sample, n_slots, seed) for sample in samples]

    assert slot_of_sample(np.array(samples), n_slots, seed, "shuffled").tolist() == expected
    assert [slot_of_sample(sample, n_slots, seed, "shuffled") for sample in samples] == expected
    assert slot_of_sample(np.int64(n_slots), n_slots, seed, "shuffled") == expected[4]


def test_the_order_never_changes():
    # Written down once: a run that is resumed with a later release must read the same samples.
    slots = slot_of_sample(np.arange(8), 1000, seed=42, order="shuffled")

    assert slots.tolist() == [201, 659, 803, 667, 418, 295, 332, 514]


def test_the_sequential_order_is_that_of_the_disk():
    assert slot_of_sample(np.arange(7), 3, seed=42, order="sequential").tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_and_seeds_have_their_own_orders():
    first = slot_of_sample(np.arange(1000), 1000, seed=42, order="shuffled")
    second_epoch = slot_of_sample(np.arange(1000, 2000), 1000, seed=42, order="shuffled")
    other_seed = slot_of_sample(np.arange(1000), 1000, seed=43, order="shuffled")

    # Two random permutations agree in one place on average; in over 10 with a probability below 1e-8.
    assert (first == second_epoch).sum() <= 10
    assert (first == other_seed).sum() <= 10
    assert (second_epoch == other_seed).sum() <= 10


def test_the_next_seed_is_not_the_next_epoch():
    # With seed + epoch as the key, a run with seed 43 would repeat the second epoch of seed 42.
    epoch = slot_of_sample(np.arange(1000, 2000), 1000, seed=42, order="shuffled")
    seed = slot_of_sample(np.arange(1000), 1000, seed=43, order="shuffled")

    assert not np.array_equal(epoch, seed)


@pytest.mark.parametrize("n_slots", [1000, 4096, 65_537])
def test_the_order_looks_random(n_slots):
    slots = slot_of_sample(np.arange(n_slots), n_slots, seed=7, order="shuffled").astype(np.float64)
    positions = np.arange(n_slots)
    # Correlations of a random permutation have a standard deviation of 1/sqrt(n); 5 of them bound it.
    bound = 5 / np.sqrt(n_slots)

    assert abs(np.corrcoef(positions, slots)[0, 1]) < bound
    assert abs(np.corrcoef(slots[:-1], slots[1:])[0, 1]) < bound
    # A step to a higher slot is as frequent as to a lower one; sd of the count is sqrt(n / 12).
    assert abs((np.diff(slots) > 0).sum() - n_slots / 2) < 5 * np.sqrt(n_slots / 12)
    # Any tenth of an epoch is spread over the whole corpus.
    tenth = np.histogram(slots[: n_slots // 10], bins=10, range=(0, n_slots))[0]
    assert abs(tenth - n_slots / 100).max() < 5 * np.sqrt(n_slots / 100)


@pytest.mark.parametrize(
    ("sample", "n_slots", "order"),
    [(-1, 10, "shuffled"), (0, 0, "shuffled"), (0, 10, "random")],
    ids=["negative sample", "no slots", "unknown order"],
)
def test_impossible_requests_are_refused(sample, n_slots, order):
    with pytest.raises(ValueError, match="must be"):
        slot_of_sample(sample, n_slots, seed=1, order=order)
