"""The documents that were read and tokenized, in files that only grow, before it is decided which of them are kept."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.preparation.signatures import N_PERMUTATIONS, Signatures
from rwkv_train.tokenizers.base import TokenArray

TOKENS, RECORDS, SIGNATURES = "tokens", "records", "signatures"
"""Names of the files."""

RECORD_DTYPE = np.dtype(
    [
        ("first_token", "<i8"),
        ("n_tokens", "<i8"),
        ("n_bytes", "<i8"),
        ("n_words", "<i8"),
        ("hash", "<u8", (2,)),
        ("domain", "<u4"),
    ]
)
"""A document that was read: where its tokens begin, their number with the end token, its text's length in UTF-8 and
in words, BLAKE2b of the UTF-8 in 128 bits, and the index of its domain."""

_ZEROS = 1 << 20  # written at once


class StoredDocuments(NamedTuple):
    """Where they lie. Each property maps a file; sent to another process, nothing is copied."""

    folder: Path
    dtype: str
    """Of the ids."""
    n_tokens: int
    n_documents: int

    @property
    def tokens(self) -> TokenArray:
        """All ids, one document after another, each with its end token."""
        return _map(self.folder / TOKENS, np.dtype(self.dtype), (self.n_tokens,))

    @property
    def records(self) -> npt.NDArray[np.void]:
        """``RECORD_DTYPE``, ``[n]``."""
        return _map(self.folder / RECORDS, RECORD_DTYPE, (self.n_documents,))

    @property
    def signatures(self) -> Signatures:
        """``[n, 128]``; only where near duplicates are looked for."""
        return _map(self.folder / SIGNATURES, np.dtype("<u4"), (self.n_documents, N_PERMUTATIONS))

    def lengths(self) -> dict[Path, int]:
        """Return how many bytes of each file count."""
        return {
            self.folder / TOKENS: self.n_tokens * np.dtype(self.dtype).itemsize,
            self.folder / RECORDS: self.n_documents * RECORD_DTYPE.itemsize,
            self.folder / SIGNATURES: self.n_documents * N_PERMUTATIONS * 4,
        }


def map_new(path: Path, dtype: npt.DTypeLike, length: int) -> "np.memmap[Any, Any]":
    """Make a file of zeros and map it for writing.

    Its space is taken at once, and a full disk is an OSError: met at a mapped page, it ends the process (SIGBUS).
    """
    left = length * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        while left:
            left -= file.write(bytes(min(left, _ZEROS)))
    return np.memmap(path, dtype, "r+", shape=(length,))


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if 0 in shape:  # cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", shape=shape)
