"""What a preparation has done so far, on disk: killed at any moment, it goes on from the last journal.

``PREFIX.unfinished/`` holds files that only grow (tokens, document records, signatures) and ``journal.json``, replaced
as a whole, which says how much of them counts. What is beyond that is cut off when the folder is opened again.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.preparation.blocks import N_BAD_KEPT, TokenizedBlock
from rwkv_train.data.preparation.journal import Journal, Json, journal_for
from rwkv_train.data.preparation.stored_documents import RECORDS, SIGNATURES, TOKENS, StoredDocuments
from rwkv_train.errors import DataError

SUFFIX = ".unfinished"
"""Ending of the folder beside the output."""

JOURNAL_SECONDS = 1.0
"""Work that a kill can undo."""

MAX_DOMAINS = 1 << 16
"""More of them are most likely no domains: addresses, numbers of documents."""

_JOURNAL, _LOCK = "journal.json", ".lock"
_JOURNAL_BEING_WRITTEN = f"{_JOURNAL}.new"


class WorkFolder:
    """The folder of a preparation that is not finished.

    Args:
        path: it is there, and locked by this process.
        journal: what it starts from; the files are cut to it.

    Raises:
        DataError: a file is shorter than the journal says.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path = path
        self.journal = journal
        self._saved_at = time.monotonic()
        self._files: dict[str, BinaryIO] = {}
        self.save()  # before the files are cut to it: those that the one before tells of are gone then
        if journal.placing is None:
            for file, n_bytes in self.documents.lengths().items():
                if file.name != SIGNATURES or journal.reading["options"]["signatures"]:
                    self._files[file.name] = _open_cut(file, n_bytes)

    @property
    def documents(self) -> StoredDocuments:
        """The documents so far; only what was saved is sure to be in the files."""
        return StoredDocuments(self.path, self.journal.dtype, self.journal.n_tokens, self.journal.n_documents)

    def add(self, block: TokenizedBlock) -> None:
        """Append what a block holds; it counts when the journal is saved, a second later at most.

        Raises:
            DataError: there are more than ``MAX_DOMAINS`` domains now.
        """
        journal = self.journal
        index = {domain: number for number, domain in enumerate(journal.domains)}
        numbers = [index.setdefault(domain, len(index)) for domain in block.domains]
        if len(index) > MAX_DOMAINS:
            raise DataError(
                f"the documents are of more than {MAX_DOMAINS} domains, {block.domains[-1]!r} among them. "
                "Choose another --domain-column, or another folder"
            )
        records = block.records.copy()
        records["first_token"] += journal.n_tokens
        if numbers:
            records["domain"] = np.array(numbers, "<u4")[records["domain"]]
        self._files[TOKENS].write(block.tokens.astype(journal.dtype, copy=False).data)
        self._files[RECORDS].write(records.tobytes())
        if block.signatures is not None:
            self._files[SIGNATURES].write(block.signatures.astype("<u4").tobytes())
        # One assignment: a signal finds all of the block counted or nothing.
        self.journal = replace(
            journal,
            block=journal.block + 1,
            n_source_bytes=journal.n_source_bytes + block.n_source_bytes,
            n_documents=journal.n_documents + len(records),
            n_tokens=journal.n_tokens + len(block.tokens),
            domains=list(index),
            n_empty=journal.n_empty + block.n_empty,
            n_bad=journal.n_bad + block.n_bad,
            first_bad=[*journal.first_bad, *map(str, block.first_bad)][:N_BAD_KEPT],
            left_out=dict(Counter(journal.left_out) + Counter(block.left_out)),
        )
        if time.monotonic() - self._saved_at > JOURNAL_SECONDS:
            self.save()

    def finish_source(self, described: Json) -> None:
        """Note that an input is read to its end."""
        self.journal = self.journal.with_source_done(described)
        self.save()

    def begin_placing(self, placing: Json) -> None:
        """Note that all files are made, and only have to be moved."""
        self.journal = replace(self.journal, placing=placing)
        self.save()

    def save(self) -> None:
        """Make what was added count, on the disk itself."""
        for growing in self._files.values():
            growing.flush()
            os.fsync(growing.fileno())
        new = self.path / _JOURNAL_BEING_WRITTEN
        with new.open("w", encoding="utf-8") as file:
            file.write(self.journal.to_json())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / _JOURNAL)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Close the files, whatever becomes of their last bytes."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk; what counts is on it already
                file.close()

    def remove(self) -> None:
        """Remove the folder; the journal goes last, for without it nothing would tell what is there."""
        _clear(self.path, but=(_JOURNAL, _LOCK))
        _clear(self.path)
        self.path.rmdir()


@contextmanager
def open_work_folder(prefix: Path, reading: Json, dtype: str, *, overwrite: bool) -> Iterator[WorkFolder]:
    """Make or open ``PREFIX.unfinished/``, for this process alone.

    Left by an exception, it keeps what is done; if that is nothing, it disappears.

    Args:
        prefix: path of the output without its endings.
        reading: see :class:`~rwkv_train.data.preparation.journal.Journal`.
        dtype: of the ids.
        overwrite: begin anew where the folder belongs to other settings, or with the first input that has changed,
            instead of refusing.

    Raises:
        DataError: it is in use, belongs to other settings, is damaged, or cannot be written.
    """
    path = add_suffix(prefix, SUFFIX)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_other_folder(path)
        lock = FileLock(path / _LOCK, blocking=False)
        with lock:
            journal = _read_journal(path, reading, dtype, overwrite=overwrite)
            folder = WorkFolder(path, journal)
            try:
                yield folder
            except BaseException as error:
                if folder.journal.n_documents == 0:
                    folder.remove()
                elif not isinstance(error, OSError):  # the disk may be full
                    folder.save()
                raise
            finally:
                folder.close()
    except Timeout:
        raise DataError(
            f"{prefix} is being prepared by another process: wait for it, or choose another --output"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path}: {error.strerror or error}; what is done is kept, and the same "
            "command goes on from there"
        ) from error


def _refuse_other_folder(path: Path) -> None:
    """Refuse a folder that no preparation made: what lies in it would be removed at the end.

    A preparation saves its journal first and removes it last, so that without one there is nothing but the lock, or a
    journal that was not written to its end.
    """
    ours = {_LOCK, _JOURNAL_BEING_WRITTEN}
    found = sorted(entry.name for entry in path.iterdir())
    if _JOURNAL not in found and (others := [name for name in found if name not in ours]):
        raise DataError(
            f"{path} is needed for the unfinished work, but it holds {others[0]!r} and no {_JOURNAL}: it is not of a "
            "preparation; move it away, or choose another --output"
        )


def _read_journal(path: Path, reading: Json, dtype: str, *, overwrite: bool) -> Journal:
    file = path / _JOURNAL
    if not file.exists():
        return Journal(reading, dtype)
    journal = journal_for(Journal.from_json(file), reading, path, overwrite=overwrite)
    return replace(journal, dtype=dtype)


def _clear(folder: Path, but: Sequence[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _open_cut(path: Path, n_bytes: int) -> BinaryIO:
    file = path.open("ab")
    if file.tell() < n_bytes:
        file.close()
        raise DataError(f"{path} is cut off: its journal tells of {n_bytes} bytes; remove {path.parent}")
    file.truncate(n_bytes)
    return file
