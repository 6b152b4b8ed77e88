"""Find documents that an earlier one makes superfluous, in bounded memory.

Each document gets the number of the first document of its cluster, its leader; who leads itself stays. The leaders and
the keys that are compared lie in mapped files; documents are looked at in buckets of their keys.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkv_train.data.preparation.signatures import N_PERMUTATIONS, Signatures
from rwkv_train.data.preparation.stored_documents import map_new
from rwkv_train.data.preparation.windows import mix

MIN_AGREEMENT = 0.8
"""Share of equal numbers in two signatures from which on two documents are near duplicates."""

N_BANDS = 16
"""Documents are compared if one of so many parts of their signatures is the same: of those that agree in 80 % of the
numbers about 95 % are found by this alone, of those that agree in 90 % all but one in ten thousand."""

_BUCKET_DOCUMENTS = 1 << 21  # sorted at once, more or less
_CHUNK_DOCUMENTS = 1 << 16

Indices = npt.NDArray[np.int64]


def exact_leaders(records: npt.NDArray[np.void], folder: Path) -> Indices:
    """Return the first document with the same text for each document.

    Args:
        records: ``RECORD_DTYPE``, ``[n]``.
        folder: for a file of 8 bytes for each document.
    """
    leaders = _new_leaders(len(records), folder)
    hashes = records["hash"]
    for bucket in _buckets(hashes[:, 0]):
        found = hashes[bucket]
        order = np.lexsort((found[:, 1], found[:, 0]))  # stable: of equal ones the earlier document is first
        members, found = bucket[order], found[order]
        is_first = np.ones(len(members), bool)
        is_first[1:] = (found[1:] != found[:-1]).any(axis=1)
        leaders[members] = members[is_first][np.cumsum(is_first) - 1]
    return leaders


def near_leaders(signatures: Signatures, folder: Path) -> Indices:
    """Return the first document of its cluster for each document; near duplicates connect a cluster.

    Args:
        signatures: ``[n, 128]``.
        folder: for two files of 8 bytes for each document.

    Source:
        Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4 (banding).
    """
    leaders = _new_leaders(len(signatures), folder)
    keys: npt.NDArray[np.uint64] = map_new(folder / "keys", np.uint64, len(signatures))
    n_rows = N_PERMUTATIONS // N_BANDS
    for band in range(N_BANDS):
        for start in range(0, len(signatures), _CHUNK_DOCUMENTS):
            chunk = slice(start, start + _CHUNK_DOCUMENTS)
            keys[chunk] = _band_keys(signatures[chunk, band * n_rows : (band + 1) * n_rows])
        for members in _buckets(keys):
            _connect_similar(leaders, signatures, members, keys[members])
    return leaders


def _new_leaders(n_documents: int, folder: Path) -> Indices:
    leaders: Indices = map_new(folder / "leaders", np.int64, n_documents)
    for start in range(0, n_documents, _CHUNK_DOCUMENTS):
        end = min(start + _CHUNK_DOCUMENTS, n_documents)
        leaders[start:end] = np.arange(start, end)
    return leaders


def _buckets(keys: npt.NDArray[np.uint64]) -> Iterator[Indices]:
    """Divide the documents by their keys, those of one key together, each part in their order."""
    n_buckets = -(-len(keys) // _BUCKET_DOCUMENTS)
    for bucket in range(n_buckets):
        yield np.concatenate(
            [
                start
                + np.flatnonzero(keys[start : start + _CHUNK_DOCUMENTS] % np.uint64(n_buckets) == bucket)
                for start in range(0, len(keys), _CHUNK_DOCUMENTS)
            ]
        )


def _band_keys(rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    keys = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        keys = mix(keys + column + np.uint64(1))
    return keys


def _connect_similar(
    leaders: Indices, signatures: Signatures, members: Indices, keys: npt.NDArray[np.uint64]
) -> None:
    """Compare the documents of each key with the first of them, then those that differ from it among each other."""
    order = np.argsort(keys, kind="stable")
    members, keys = members[order], keys[order]
    while len(members):
        is_first = np.ones(len(members), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        firsts = members[is_first][np.cumsum(is_first) - 1]
        is_similar = is_first | (leaders[members] == leaders[firsts])
        unsure = np.flatnonzero(~is_similar)
        for start in range(0, len(unsure), _CHUNK_DOCUMENTS):
            part = unsure[start : start + _CHUNK_DOCUMENTS]
            agreement = (signatures[members[part]] == signatures[firsts[part]]).mean(axis=1)
            is_similar[part] = agreement >= MIN_AGREEMENT
        _connect(leaders, members[is_similar], firsts[is_similar])
        members, keys = members[~is_similar], keys[~is_similar]


def _connect(leaders: Indices, a: Indices, b: Indices) -> None:
    """Join the clusters of each pair; the lower number leads."""
    while True:
        x, y = _lead(leaders, a), _lead(leaders, b)
        differ = x != y
        if not differ.any():
            leaders[a], leaders[b] = x, y
            return
        np.minimum.at(leaders, np.maximum(x, y)[differ], np.minimum(x, y)[differ])


def _lead(leaders: Indices, members: Indices) -> Indices:
    while True:
        above = leaders[members]
        if (above == members).all():
            return members
        members = above
