"""The order of samples: a permutation in each epoch, the same on every machine and for ever."""

from math import isqrt

import numpy as np
import pytest
from sympy import isprime

from rwkv_train.data.sampler import n_slots, random_number, seed_of_corpus, slot_of_sample

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
    [(-1, 10, "shuffled"), (0, 0, "shuffled"), (0, 10, "random"), (0, 7, "official")],
    ids=["negative sample", "no slots", "unknown order", "a prime that is 1 modulo 3"],
)
def test_impossible_requests_are_refused(sample, n_slots, order):
    with pytest.raises(ValueError, match="must be"):
        slot_of_sample(sample, n_slots, seed=1, order=order)


MINIPILE, PILE = 1_498_226_207, 332_115_325_534  # tokens


@pytest.mark.parametrize(
    ("n_tokens", "ctx_len", "prime"),
    [
        (MINIPILE, 512, 2_926_181),
        (MINIPILE, 4096, 365_759),
        (PILE, 1024, 324_331_313),
        (PILE, 2048, 162_165_671),
        (PILE, 4096, 81_082_817),
        (PILE, 8192, 40_541_399),
    ],
)
def test_the_slots_of_the_official_order_are_the_published_magic_primes(n_tokens, ctx_len, prime):
    assert n_slots(n_tokens, ctx_len, "official") == prime


@pytest.mark.parametrize("n_whole", [18, 228, 1000, 50_021, 2**40])
def test_the_magic_prime_is_the_largest_of_its_kind(n_whole):
    prime = n_slots(n_whole * 10 + 3, 10, "official")
    later = [n for n in range(prime, n_whole) if n % 3 == 2 and isprime(n)]
    assert later == [prime]


@pytest.mark.parametrize("prime", [365_759, 2_926_181])
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_official_order_reads_every_slot_once(prime, epoch):
    samples = np.arange(epoch * prime, (epoch + 1) * prime)
    slots = slot_of_sample(samples, prime, seed=42, order="official")
    assert np.array_equal(np.sort(slots), np.arange(prime))


@pytest.mark.parametrize(
    ("prime", "first"),
    [  # f, 8 f, 27 f, 64 f, 125 f modulo p, worked out in whole numbers
        (365_759, [226_051, 345_372, 251_233, 202_663, 92_932]),
        (2_926_181, [1_808_479, 2_763_108, 2_010_037, 1_621_597, 743_938]),
        (81_082_817, [50_111_936, 76_564_220, 55_697_200, 44_934_041, 20_615_091]),
    ],
)
def test_the_official_order_begins_with_these_slots(prime, first):
    assert slot_of_sample(np.arange(5), prime, 0, "official").tolist() == first


@pytest.mark.parametrize("prime", [2, 365_759, 324_331_313, 4_294_967_291, 195_312_499_973])
def test_the_official_order_is_exact_for_arrays_and_single_samples(prime):
    factor = (isqrt(5 * prime * prime) - prime) // 2  # the golden section without float64
    samples = [0, 1, 7, prime - 1, prime, 5 * prime + prime // 3, 10**15]
    expected = [factor * (sample + 1) ** 3 % prime for sample in samples]

    slots = slot_of_sample(np.array(samples), prime, seed=1, order="official")

    assert slots.dtype == np.int64
    assert slots.tolist() == expected
    assert [slot_of_sample(sample, prime, 1, "official") for sample in samples] == expected
    assert slot_of_sample(np.int64(7), prime, 1, "official") == expected[2]


def test_the_official_order_knows_no_seed_and_no_epoch():
    first = slot_of_sample(np.arange(101), 101, seed=1, order="official")
    assert np.array_equal(first, slot_of_sample(np.arange(101), 101, seed=2, order="official"))
    assert np.array_equal(first, slot_of_sample(np.arange(101, 202), 101, seed=1, order="official"))


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("n_tokens", "slots"), [(401, 4), (400, 3), (100, 0), (101, 1), (0, 0)])
def test_every_sample_has_a_token_after_its_last(order, n_tokens, slots):
    assert n_slots(n_tokens, 100, order) == slots


@pytest.mark.parametrize("n_whole", [0, 1, 2, 3, 17, 227])
def test_a_corpus_too_small_for_a_magic_prime_is_refused(n_whole):
    # 227 is 2 modulo 3 and prime, but a prime must lie below the number; the next, 197, is under nine tenths.
    with pytest.raises(
        ValueError, match=rf"would read \d+ of the {n_whole} samples in .* ctx_len, or data.order"
    ):
        n_slots(n_whole * 100, 100, "official")


def test_the_slots_of_an_unknown_order_are_refused():
    with pytest.raises(ValueError, match="order must be one of"):
        n_slots(1000, 10, "random")


@pytest.mark.parametrize("seed", [0, 42, 2**70 + 5])
def test_random_numbers_follow_the_formula(seed):
    expected = [mix((mix(seed & MASK64) + number) & MASK64) for number in (0, 1, 10**18)]
    assert [random_number(seed, number) for number in (0, 1, 10**18)] == expected


@pytest.mark.parametrize("size", [2, 10, 1000])
def test_places_that_are_drawn_from_a_buffer_are_spread_evenly(size):
    places = [random_number(42, number) % size for number in range(20 * size)]
    counts = np.bincount(places, minlength=size)
    # chi-squared over n - 1 degrees of freedom has the mean n - 1 and a variance of twice that; 5 deviations.
    assert np.square(counts - 20).sum() / 20 < size - 1 + 5 * np.sqrt(2 * size)


def test_the_first_of_several_corpora_has_the_seed_of_the_run_and_each_another_one():
    seeds = [seed_of_corpus(42, index) for index in range(1000)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)
