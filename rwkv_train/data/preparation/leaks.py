"""Find held-out documents of which training has much: 16 words in a row that both have.

Each held-out document gives its disjoint windows of 16 words, its probes; they are looked up among all windows of all
training documents. The texts come from the tokens, the very ones that training reads. The probes are held in memory,
up to 60 bytes each while they are sorted; the rest is read in ranges of documents, by all processes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.preparation.pieces import Pieces
from rwkv_train.data.preparation.stored_documents import StoredDocuments
from rwkv_train.data.preparation.windows import Hashes, window_hashes, word_hashes
from rwkv_train.data.preparation.workers import ordered_map
from rwkv_train.tokenizers.base import Tokenizer

PROBE_WORDS = 16
"""Words of a probe. A held-out document of fewer has none, and is only compared as a whole, by its hash."""

_RANGE_TOKENS = 1 << 21
_CHUNK_DOCUMENTS = 1 << 16
_MAX_TABLE_BITS = 27


class Texts(NamedTuple):
    """Some of the documents that were read, in a form that is small to send to another process."""

    documents: StoredDocuments
    choices: Path
    """A byte for each document."""
    choice: int
    """What it is for those that are meant."""
    make_tokenizer: Callable[[], Tokenizer]


class Range(NamedTuple):
    """Documents that are looked at at once."""

    start: int
    end: int


class Probes(NamedTuple):
    """The probes of the held-out documents of a range."""

    hashes: Hashes
    documents: npt.NDArray[np.int64]
    """The document of each probe."""


def leaked_shares(
    held_out: Texts, training: Texts, n_workers: int, folder: Path
) -> Iterator[tuple[int, float]]:
    """Yield each held-out document that has probes, and the share of them that training has too.

    Args:
        held_out: documents to look for.
        training: documents to look in.
        n_workers: processes, as in :func:`~rwkv_train.data.preparation.workers.ordered_map`.
        folder: for a file of 8 bytes for each probe.
    """
    found = list(ordered_map(partial(_ProbeMaker, held_out), _ranges(held_out.documents), n_workers))
    hashes = np.concatenate([np.empty(0, np.uint64), *(one.hashes for one in found)])
    documents = np.concatenate([np.empty(0, np.int64), *(one.documents for one in found)])
    del found
    if not len(hashes):
        return
    known, of_probe = np.unique(hashes, return_inverse=True)
    path = folder / "probes.npy"
    np.save(path, known)
    is_hit = np.zeros(len(known), bool)
    for hits in ordered_map(partial(_Search, training, path), _ranges(training.documents), n_workers):
        is_hit[hits] = True
    is_first = np.ones(len(documents), bool)
    is_first[1:] = documents[1:] != documents[:-1]
    starts = np.flatnonzero(is_first)
    shares = np.add.reduceat(is_hit[of_probe].astype(np.int64), starts) / np.diff([*starts, len(documents)])
    yield from zip(documents[starts].tolist(), shares.tolist(), strict=True)


class _ProbeMaker:
    def __init__(self, texts: Texts) -> None:
        self._texts = _TextReader(texts)

    def __call__(self, span: Range) -> Probes:
        hashes, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number, text in self._texts.read(span):
            probes = window_hashes(word_hashes(text), PROBE_WORDS)[::PROBE_WORDS]
            hashes.append(probes)
            documents.append(np.full(len(probes), number))
        return Probes(np.concatenate(hashes), np.concatenate(documents))


class _Search:
    """Looks the windows of training documents up; returns the numbers of the probes that are there."""

    def __init__(self, texts: Texts, path: Path) -> None:
        self._texts = _TextReader(texts)
        self._known: Hashes = np.load(path, mmap_mode="r")
        # Most windows are no probes, and a table of bits tells that of nearly all of them at once.
        n_bits = min(_MAX_TABLE_BITS, len(self._known).bit_length() + 4)
        self._shift = np.uint64(64 - n_bits)
        self._may_be = np.zeros(1 << n_bits, bool)
        self._may_be[self._known >> self._shift] = True

    def __call__(self, span: Range) -> npt.NDArray[np.int64]:
        hits = [np.empty(0, np.int64)]
        for _, text in self._texts.read(span):
            windows = window_hashes(word_hashes(text), PROBE_WORDS)
            windows = windows[self._may_be[windows >> self._shift]]
            places = np.searchsorted(self._known, windows)
            places = np.minimum(places, len(self._known) - 1)
            hits.append(places[self._known[places] == windows])
        return np.unique(np.concatenate(hits))


class _TextReader:
    def __init__(self, texts: Texts) -> None:
        self._tokens, self._records = texts.documents.tokens, texts.documents.records
        self._choices, self._choice = np.memmap(texts.choices, np.uint8, "r"), texts.choice
        self._pieces = Pieces(texts.make_tokenizer())

    def read(self, span: Range) -> Iterator[tuple[int, bytes]]:
        is_chosen = self._choices[span.start : span.end] == self._choice
        for number in (span.start + np.flatnonzero(is_chosen)).tolist():
            first, length = (int(self._records[name][number]) for name in ("first_token", "n_tokens"))
            yield number, self._pieces.decode(self._tokens[first : first + length])


def _ranges(documents: StoredDocuments) -> Iterator[Range]:
    """Divide the documents into ranges of about ``_RANGE_TOKENS``."""
    firsts = documents.records["first_token"]
    start = 0
    for chunk in range(0, len(firsts), _CHUNK_DOCUMENTS):
        shelves = firsts[chunk : chunk + _CHUNK_DOCUMENTS] // _RANGE_TOKENS
        for end in [*(chunk + 1 + np.flatnonzero(np.diff(shelves))).tolist(), chunk + len(shelves)]:
            yield Range(start, end)
            start = end
