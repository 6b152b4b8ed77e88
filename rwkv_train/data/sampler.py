"""Which part of the corpus a training sample reads: a pure function, so a run can resume anywhere.

The corpus is cut into slots of ``ctx_len`` tokens. In each epoch every slot is read exactly once, in an order
that is computed, not stored. ``"shuffled"``: a Feistel network enciphers the position within the epoch.
``"official"``: the order of RWKV-LM, cubes modulo a prime, the same in every epoch and for every seed. All
arithmetic is on integers, so an order is the same on every machine.
"""

import math
from typing import Any, overload

import numpy as np
import numpy.typing as npt

ORDERS = ("shuffled", "sequential", "official")
"""Names of the orders."""

_N_ROUNDS = 8
_MIN_HALF_BITS = 4  # below, eight rounds on so few values mix badly
_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's step from one number to the next

_Number = Any  # an int, or an array of uint64; the same formula serves both

_LEAST_USED_PART = 0.9  # of a corpus, by the official order: the published trainer's own limit


def n_slots(n_tokens: int, ctx_len: int, order: str) -> int:
    """Return how many samples of ``ctx_len`` tokens (and one more to predict) an epoch reads.

    That is all that a corpus holds, but under ``"official"`` the largest prime p below their number with
    p mod 3 = 2 (RWKV-LM's "magic prime"), since only then no two of 1, 2, ..., p have the same cube modulo p.

    Args:
        n_tokens: tokens in the corpus.
        ctx_len: tokens in a sample.
        order: a name from ``ORDERS``.

    Raises:
        ValueError: the corpus is so small that the official order would leave out a tenth of it or more, or the
            order is unknown.

    Source:
        RWKV-LM, ``RWKV-v5/compute_magic_prime.py``.
    """
    _check_order(order)
    if order != "official":
        return max(0, (n_tokens - 1) // ctx_len)
    n_whole = n_tokens // ctx_len
    prime = next((n for n in range(n_whole - 1, 1, -1) if n % 3 == 2 and _is_prime(n)), 0)
    if prime <= _LEAST_USED_PART * n_whole:
        raise ValueError(
            f"the order 'official' would read {prime} of the {n_whole} samples in {n_tokens:,} tokens (the largest "
            "prime below that is 2 modulo 3), and it must be over nine in ten; use more tokens, a smaller ctx_len, "
            "or data.order 'shuffled'"
        )
    return prime


@overload
def slot_of_sample(sample: int, n_slots: int, seed: int, order: str) -> int: ...
@overload
def slot_of_sample(
    sample: npt.NDArray[np.int64], n_slots: int, seed: int, order: str
) -> npt.NDArray[np.int64]: ...
def slot_of_sample(
    sample: int | npt.NDArray[np.int64], n_slots: int, seed: int, order: str
) -> int | npt.NDArray[np.int64]:
    """Return the slot that a sample reads.

    Sample s is position ``s % n_slots`` of epoch ``s // n_slots``. ``"shuffled"`` permutes the positions of
    each epoch by seed and epoch; ``"sequential"`` reads them as they lie; ``"official"`` knows no seed.

    With ``mix`` the finalizer of SplitMix64, ``key = mix(mix(seed) + epoch)`` and the position as two halves
    of h bits, each of 8 rounds i maps ``(left, right)`` to ``(right, left ^ (mix(key + 2**32 * (i + 1) +
    right) % 2**h))``. The domain ``2**(2h)`` is the smallest that holds ``n_slots`` (h >= 4); a result
    beyond ``n_slots`` is enciphered again until it is below (cycle walking).

    Official: with the prime ``p = n_slots`` and ``f = int(p (sqrt(5) - 1) / 2)`` in float64, the slot is
    ``f (s + 1)**3 mod p``.

    Args:
        sample: number of the sample from 0, or an array of numbers.
        n_slots: slots in an epoch, from :func:`n_slots`.
        seed: any integer; its lowest 64 bits count.
        order: a name from ``ORDERS``.

    Returns:
        The slot, in ``[0, n_slots)``, of the type of ``sample``.

    Raises:
        ValueError: a sample is negative, there is no slot, the order is unknown, or ``n_slots`` cannot be the
            prime of the official order.

    Source:
        Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (Feistel network, cycle walking);
        Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64); RWKV-LM,
        ``RWKV-v7/train_temp/src/dataset.py`` (official).
    """
    if n_slots < 1 or np.min(sample, initial=0) < 0:
        raise ValueError(f"sample numbers must be >= 0 and n_slots >= 1, got n_slots {n_slots}")
    _check_order(order)
    if order == "sequential":
        return sample % n_slots
    if order == "official":
        official: int | npt.NDArray[np.int64] = _official_slot(sample, n_slots)
        return official
    half_bits = max(_MIN_HALF_BITS, -(-(n_slots - 1).bit_length() // 2))
    seed_key = _mix(seed & _MASK64)
    if isinstance(sample, np.ndarray):
        epochs, slots = np.divmod(sample.astype(np.uint64), np.uint64(n_slots))
        keys = _mix(epochs + np.uint64(seed_key))
        walking = np.ones(slots.shape, dtype=bool)
        while walking.any():
            slots[walking] = _encipher(slots[walking], keys[walking], half_bits)
            walking = slots >= n_slots
        return slots.astype(np.int64)
    epoch, position = divmod(int(sample), n_slots)  # numpy's own scalars would overflow
    key = _mix((epoch + seed_key) & _MASK64)
    slot: int = _encipher(position, key, half_bits)
    while slot >= n_slots:
        slot = _encipher(slot, key, half_bits)
    return slot


def seed_of_corpus(seed: int, index: int) -> int:
    """Return the seed of one of several corpora, so that each has an order of its own; the first has ``seed``.

    Args:
        seed: seed of the run.
        index: place of the corpus among those of the run, from 0.
    """
    return (seed + index * _GAMMA) & _MASK64


def random_number(seed: int, number: int) -> int:
    """Return number ``number`` of a sequence of random 64-bit numbers, each computed by itself.

    Args:
        seed: which sequence; its lowest 64 bits count.
        number: place in the sequence, from 0.
    """
    return int(_mix((_mix(seed & _MASK64) + number) & _MASK64))


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


def _official_slot(sample: _Number, prime: int) -> _Number:
    """RWKV-LM's order. No primality test here, in the inner loop; :func:`n_slots` gives the prime."""
    if prime % 3 != 2:
        raise ValueError(f"n_slots must be a prime p with p % 3 == 2 for the order 'official', got {prime}")
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    if not isinstance(sample, np.ndarray):
        return factor * (int(sample) + 1) ** 3 % prime
    # Products of two numbers below 2**32 fit 64 bits; Python's own integers, much slower, have no limit.
    x = (sample.astype(np.uint64 if prime < 1 << 32 else object) + 1) % prime
    return (x * x % prime * x % prime * factor % prime).astype(np.int64)


def _is_prime(n: int) -> bool:
    """Trial division: a few milliseconds for any corpus there is."""
    return n > 1 and bool(np.all(n % np.arange(2, math.isqrt(n) + 1)))


def _encipher(value: _Number, key: _Number, half_bits: int) -> _Number:
    """Permute the values below ``4 ** half_bits``."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for index in range(_N_ROUNDS):
        round_key = (index + 1) << 32
        left, right = right, left ^ (_mix((key + round_key + right) & _MASK64) & mask)
    return (left << half_bits) | right


def _mix(x: _Number) -> _Number:
    """Mix 64 bits, one to one, so that every input bit changes every output bit.

    Arrays wrap around by themselves; the masks are for Python's integers.
    """
    x = (x + _GAMMA) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
