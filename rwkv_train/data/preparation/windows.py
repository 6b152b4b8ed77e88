"""Words of a text, counted and hashed without a Python loop over them.

A word of a hash is a run of bytes without ASCII white space. With a random 64-bit value ``v`` for each byte and an
odd ``B``, a word ``b_0 .. b_{n-1}`` has the hash ``sum_i v[b_i] B**i`` modulo ``2**64``; prefix sums over the text give
all of them, each multiplied by ``B**-start``. A window of n words has a weighted sum of their hashes, mixed.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_PIECE_BYTES = 1 << 20  # a text is hashed in such pieces: 24 bytes of memory for each of theirs
_WHITE_BYTES = bytes(byte < 128 and chr(byte).isspace() for byte in range(256))
_WHITE = re.compile(rb"[\x09-\x0d\x1c-\x20]")
_WIDE_WHITE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")

# Fixed for ever: signatures in an unfinished preparation are made of them.
_CHANCE = np.random.default_rng(0x5256_4B57).integers(0, 1 << 64, 256 + 64, dtype=np.uint64)
_VALUES, _WEIGHTS = _CHANCE[:256], _CHANCE[256:] | np.uint64(1)
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def count_words(text: str, data: bytes) -> int:
    r"""Return ``len(re.split(r"\s+", text))``, several times faster.

    Args:
        text: not empty.
        data: the same in UTF-8.
    """
    if not text.isascii() and _WIDE_WHITE.search(text):
        return len(re.split(r"\s+", text))
    is_white = _white(data)
    return 1 + int(is_white[0]) + int(np.count_nonzero(is_white[1:] > is_white[:-1]))


def word_hashes(data: bytes) -> Hashes:
    """Hash the words of a text in UTF-8, in order."""
    return np.concatenate([np.empty(0, np.uint64), *map(_hash_piece, _pieces(data))])


def window_hashes(words: Hashes, n_words: int) -> Hashes:
    """Hash all windows of so many words in a row.

    Args:
        words: the words of a text, from :func:`word_hashes`.
        n_words: 1 to 64.

    Returns:
        ``[max(0, words - n_words + 1)]``, in order.
    """
    n_windows = max(0, len(words) - n_words + 1)
    windows = np.zeros(n_windows, np.uint64)
    for index, weight in enumerate(_WEIGHTS[:n_words]):
        windows += words[index : index + n_windows] * weight
    return mix(windows)


def mix(x: Hashes) -> Hashes:
    """Mix 64 bits, one to one, so that every input bit changes every output bit.

    Source:
        Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _white(data: bytes) -> npt.NDArray[np.bool_]:
    return np.frombuffer(data.translate(_WHITE_BYTES), np.bool_)


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut a long text between words."""
    start = 0
    while start < len(data):
        gap = _WHITE.search(data, start + _PIECE_BYTES)
        end = gap.start() if gap else len(data)
        yield data[start:end]
        start = end


def _hash_piece(data: bytes) -> Hashes:
    is_white = np.concatenate([[True], _white(data), [True]])
    edges = np.flatnonzero(is_white[1:] != is_white[:-1])  # a start, an end, a start, ...
    starts, ends = edges[::2], edges[1::2]
    powers, inverses = _powers(max(len(data), _PIECE_BYTES).bit_length())
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_VALUES[np.frombuffer(data, np.uint8)] * powers[: len(data)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


@lru_cache(maxsize=2)
def _powers(n_bits: int) -> tuple[Hashes, Hashes]:
    """Return ``B**i`` and ``B**-i`` for i below ``2**n_bits``."""
    both = []
    for base in (_BASE, _INVERSE):
        factors = np.full(1 << n_bits, base, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors))
    return both[0], both[1]
