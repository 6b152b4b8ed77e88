"""Write the chosen documents as a corpus: first in the work folder, then all files move to their places together."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.atomic import AtomicFiles
from rwkv_train.data.binidx import IndexWriter, add_suffix
from rwkv_train.data.preparation.choosing import Order
from rwkv_train.data.preparation.stored_documents import TOKENS, StoredDocuments
from rwkv_train.data.sidecar import DOCUMENT_DTYPE, DocumentTableWriter, DomainCounter, DomainTotals
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import TokenArray

SUFFIXES = (".bin", ".docs.npy", ".json", ".idx")
"""Endings of the files of a corpus. The index is the last one: where it is, the rest is."""

_CHUNK_DOCUMENTS = 1 << 16
_CHUNK_TOKENS = 1 << 22


class PartTotals(NamedTuple):
    """What a part turned out to hold."""

    n_documents: int
    n_tokens: int
    max_token: int
    sha256: str
    """Of its ids."""
    domains: tuple[DomainTotals, ...]


def write_part(documents: StoredDocuments, order: Order, domains: Sequence[str], prefix: Path) -> PartTotals:
    """Write ``.docs.npy`` and ``.idx`` of a part, and ``.bin`` unless its tokens are already one file as they are.

    Args:
        documents: those that were read.
        order: those of the part, one at least.
        domains: names, by the indices in the records.
        prefix: path of the part's files in the work folder.
    """
    counter = DomainCounter(domains)
    table_path, index_path = add_suffix(prefix, ".docs.npy"), add_suffix(prefix, ".idx")
    bin_paths = [] if order.is_as_read else [add_suffix(prefix, ".bin")]
    with AtomicFiles([*bin_paths, table_path, index_path], overwrite=True) as files:
        table = DocumentTableWriter(files[table_path])
        index = IndexWriter(files[index_path], documents.dtype)
        tokens = _Tokens(documents.tokens, [files[path] for path in bin_paths])
        for start in range(0, len(order), _CHUNK_DOCUMENTS):
            chosen = documents.records[order[start : start + _CHUNK_DOCUMENTS]]
            counts = np.stack([chosen[name] for name in ("n_tokens", "n_bytes", "n_words")], axis=1)
            rows = np.empty(len(chosen), DOCUMENT_DTYPE)
            rows["domain"] = counter.add(chosen["domain"], counts)
            rows["n_bytes"], rows["n_words"] = chosen["n_bytes"], chosen["n_words"]
            table.add(rows)
            index.add(chosen["n_tokens"])
            for span in _runs(chosen):
                tokens.pass_on(span)
        table.finish()
        index.finish()
    totals = counter.totals()
    n_tokens = sum(domain.n_tokens for domain in totals)
    return PartTotals(len(order), n_tokens, tokens.highest, tokens.sha256, totals)


def moves_of_parts(documents: StoredDocuments, parts: Mapping[Path, Path]) -> list[tuple[str, str]]:
    """Return which file goes where, in the order of the moves: the indices last.

    Args:
        documents: those that were read.
        parts: prefix of each part in its place, by its prefix below the work folder.

    Returns:
        What :func:`place` takes.
    """
    found = []
    for suffix in SUFFIXES:
        for made_prefix, prefix in parts.items():
            made = add_suffix(made_prefix, suffix)
            is_as_read = suffix == ".bin" and not made.exists()
            source = documents.folder / TOKENS if is_as_read else made
            found.append((source.relative_to(documents.folder).as_posix(), add_suffix(prefix, suffix).name))
    return found


def place(work: Path, outputs: Path, names: Sequence[tuple[str, str]]) -> None:
    """Move files to their places; started again after a kill at any moment, it ends the same.

    Args:
        work: the work folder.
        outputs: the folder of the places.
        names: of each file in the one and in the other.

    Raises:
        DataError: a file is neither here nor there.
    """
    moves = [(work / made, outputs / there) for made, there in names]
    for made, there in moves:
        if not made.exists() and not there.exists():
            raise DataError(f"{made} is gone; remove {work} and prepare the data again")
    for made, there in moves:
        # What is to be replaced is no corpus from the first move on.
        if there.suffix == ".idx" and made.exists():
            there.unlink(missing_ok=True)
    for made, there in moves:
        if made.exists():
            made.replace(there)
    folder = os.open(outputs, os.O_RDONLY)
    try:
        os.fsync(folder)  # the moves themselves
    finally:
        os.close(folder)


class _Tokens:
    """Hashes ids, and copies them to a file if there is one."""

    def __init__(self, tokens: TokenArray, files: Sequence[BinaryIO]) -> None:
        self._tokens = tokens
        self._files = files
        self._hash = hashlib.sha256()
        self.highest = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def pass_on(self, span: slice) -> None:
        for start in range(span.start, span.stop, _CHUNK_TOKENS):
            ids = self._tokens[start : min(start + _CHUNK_TOKENS, span.stop)]
            data = np.ascontiguousarray(ids).data.cast("B")
            self._hash.update(data)
            self.highest = max(self.highest, int(ids.max()))
            for file in self._files:
                file.write(data)


def _runs(records: npt.NDArray[np.void]) -> Iterator[slice]:
    """Join documents whose tokens follow one another."""
    firsts = records["first_token"]
    ends = firsts + records["n_tokens"]
    breaks = np.flatnonzero(firsts[1:] != ends[:-1])
    starts = firsts[np.concatenate([[0], breaks + 1])]
    stops = ends[np.concatenate([breaks, [len(records) - 1]])]
    return (slice(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))
