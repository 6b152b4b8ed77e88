"""Decide which of the documents are written, to which part of the corpus, and in which order."""

from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.preparation.duplicates import exact_leaders, near_leaders
from rwkv_train.data.preparation.leaks import Texts, leaked_shares
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.preparation.stored_documents import StoredDocuments, map_new
from rwkv_train.data.sampler import slot_of_sample
from rwkv_train.tokenizers.base import Tokenizer

Indices = npt.NDArray[np.int64]

_CHUNK_DOCUMENTS = 1 << 16


class Choice(IntEnum):
    """What becomes of a document."""

    TRAIN = 0
    HELD_OUT = 1
    DUPLICATE = 2
    LEAKED = 3


class Order:
    """The documents of a part, in the order in which they are written.

    Args:
        numbers: of those documents as they were read; ``None``: all.
        length: how many they are.
        seed: of the permutation; ``None``: as they were read.
    """

    def __init__(self, numbers: Indices | None, length: int, seed: int | None) -> None:
        self._numbers = numbers
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    @property
    def is_as_read(self) -> bool:
        """Whether it is all documents, one after another."""
        return self._numbers is None and self._seed is None

    def __getitem__(self, span: slice) -> Indices:
        """Return the numbers of the documents at these positions."""
        places = np.arange(*span.indices(self._length))
        if self._seed is not None:
            places = slot_of_sample(places, self._length, self._seed, "shuffled")
        return places if self._numbers is None else np.asarray(self._numbers[places])


class Chosen(NamedTuple):
    """The decisions."""

    train: Order
    held_out: Order | None
    """``None``: nothing is to be held out."""
    n_duplicates: dict[int, int]
    """By the index of the domain."""
    n_leaked: dict[int, int]
    """By the index of the domain."""


def choose(
    documents: StoredDocuments,
    options: PrepareOptions,
    make_tokenizer: Callable[[], Tokenizer],
    n_workers: int,
    folder: Path,
) -> Chosen:
    """Look for duplicates, hold documents out, and look for what leaks from training into them.

    Args:
        documents: one at least.
        options: what to do.
        make_tokenizer: in any process.
        n_workers: processes.
        folder: an empty one, for 17 bytes for each document.
    """
    if options.dedup is None and options.valid_fraction is None:
        return Chosen(Order(None, documents.n_documents, options.shuffle), None, {}, {})
    path = folder / "choices"
    choices = map_new(path, np.uint8, documents.n_documents)
    if options.valid_fraction is not None:
        _hold_out(choices, documents, options.valid_fraction)
    if options.dedup is not None:
        leaders = (
            exact_leaders(documents.records, folder)
            if options.dedup == "exact"
            else near_leaders(documents.signatures, folder)
        )
        for chunk in _chunks(documents.n_documents):
            is_later = leaders[chunk] != np.arange(chunk.start, chunk.stop)
            choices[chunk][is_later] = Choice.DUPLICATE
    choices.flush()
    if options.valid_fraction is not None and options.max_leak < 1:
        texts = partial(Texts, documents, path, make_tokenizer=make_tokenizer)
        shares = leaked_shares(texts(Choice.HELD_OUT), texts(Choice.TRAIN), n_workers, folder)
        for number, share in shares:
            if share > options.max_leak:
                choices[number] = Choice.LEAKED
    return Chosen(
        _order(choices, Choice.TRAIN, folder, options.shuffle),
        None if options.valid_fraction is None else _order(choices, Choice.HELD_OUT, folder, options.shuffle),
        _by_domain(choices, Choice.DUPLICATE, documents),
        _by_domain(choices, Choice.LEAKED, documents),
    )


def _hold_out(choices: npt.NDArray[np.uint8], documents: StoredDocuments, fraction: float) -> None:
    """Choose by the hash of the text alone: the same one wherever the document is, and for all of its copies."""
    limit = np.uint64(min(int(fraction * 2.0**64), (1 << 64) - 1))
    hashes = documents.records["hash"][:, 1]
    for chunk in _chunks(len(choices)):
        choices[chunk][hashes[chunk] < limit] = Choice.HELD_OUT


def _order(choices: npt.NDArray[np.uint8], choice: Choice, folder: Path, seed: int | None) -> Order:
    """List the documents of a choice, in a file."""
    path = folder / f"order-{choice.name.lower()}"
    with path.open("wb") as file:
        for chunk in _chunks(len(choices)):
            file.write((chunk.start + np.flatnonzero(choices[chunk] == choice)).astype("<i8").tobytes())
        n_bytes = file.tell()
    if n_bytes == 0:
        return Order(np.empty(0, np.int64), 0, None)
    if n_bytes == 8 * len(choices):
        return Order(None, len(choices), seed)
    return Order(np.memmap(path, "<i8", "r"), n_bytes // 8, seed)


def _by_domain(choices: npt.NDArray[np.uint8], choice: Choice, documents: StoredDocuments) -> dict[int, int]:
    counts: Counter[int] = Counter()
    domains = documents.records["domain"]
    for chunk in _chunks(len(choices)):
        counts.update(domains[chunk][choices[chunk] == choice].tolist())
    return dict(sorted(counts.items()))


def _chunks(length: int) -> list[slice]:
    return [
        slice(start, min(start + _CHUNK_DOCUMENTS, length)) for start in range(0, length, _CHUNK_DOCUMENTS)
    ]
