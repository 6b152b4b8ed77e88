"""What a source of text is: a name, blocks of raw records in a fixed order, and documents in each block."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from rwkv_train.data.sidecar import Source as SourceIdentity
from rwkv_train.errors import DataError

__all__ = [
    "BLOCK_BYTES",
    "COLUMN_OPTIONS",
    "MAX_RECORD_BYTES",
    "UNKNOWN_DOMAIN",
    "BadRecord",
    "Block",
    "Document",
    "FileSource",
    "NoDocumentsError",
    "Record",
    "Source",
    "SourceIdentity",
    "SourceOptions",
    "cannot_read",
    "hash_file",
    "show_path",
]

UNKNOWN_DOMAIN = "unknown"
"""Domain of a document that names none."""

BLOCK_BYTES = 1 << 22
"""Raw bytes of a block, more or less: it ends with a whole record."""

MAX_RECORD_BYTES = 1 << 30
"""A longer record is refused, so that memory is bounded whatever a file holds."""


class Document(NamedTuple):
    """One text, which is tokenized and evaluated on its own."""

    text: str
    """Valid Unicode: it has a UTF-8 form. May be empty."""
    domain: str
    """Where it comes from: ``meta.pile_set_name``, a column, a folder or a file; or "unknown"."""


class BadRecord(NamedTuple):
    """A record that is no document; those around it are not affected."""

    where: str
    """The file, and the line, row or document in it, counted from 1 (lines, rows) or 0 (documents of a pair)."""
    why: str
    """What was found, and what was wanted."""

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class Record(NamedTuple):
    """A record with all its fields."""

    where: str
    """As in :class:`BadRecord`."""
    fields: dict[str, object]
    """Strings, numbers, lists and objects, as in JSON."""


class NoDocumentsError(DataError):
    """A file is as it should be, and has no records: alone it is refused, in a folder passed over."""


class SourceOptions(NamedTuple):
    """How the inputs are read."""

    format: str | None = None
    """A name from ``opening.FORMATS``; ``None``: the ending of the name tells."""
    text_column: str = "text"
    """Key, column or field that holds the text, where a record has several."""
    domain_column: str | None = None
    """The one that holds the domain; ``None``: ``meta.pile_set_name`` where there is a ``meta``."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset that has several."""
    dataset_split: str = "train"
    """Its split."""
    dataset_streaming: bool = False
    """Read it as it comes over the network, instead of downloading it whole first."""
    pair_tokenizer: str | None = None
    """What ``load_tokenizer`` takes, for a ``.bin/.idx`` pair without a sidecar that names it."""
    whole_records: bool = False
    """Read all fields, for :meth:`Block.whole_records`; then no column has to be there."""


COLUMN_OPTIONS = frozenset({"text_column", "domain_column"})


class Block(Protocol):
    """A few megabytes of raw records: small to send to another process, which then parses them."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the source, as stored, that this block takes up; over all blocks they add up to its size."""

    def records(self) -> Iterator[Document | BadRecord]:
        """Yield what the records hold, in order.

        Raises:
            DataError: what the block points to cannot be read.
        """

    def whole_records(self) -> Iterator[Record | BadRecord]:
        """Yield the same records with all their fields; the source must have been opened for it.

        Raises:
            DataError: as :meth:`records`.
        """


class Source(ABC):
    """Text to read: a file, a folder, a dataset or a tokenized corpus."""

    name: str
    """As the user knows it."""
    n_bytes: int | None
    """Bytes as stored, over all blocks; ``None``: not known before the end."""
    uses: frozenset[str]
    """Names of the ``SourceOptions`` that change how it is read."""

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yield the blocks, always the same ones, without the first ``start``.

        Raises:
            DataError: the source is damaged, cut off or holds nothing. What comes before the damage was yielded.
        """
        return islice(self._cut(), start, None)

    @abstractmethod
    def describe(self) -> SourceIdentity:
        """Return name, size and hash, which costs a reading of all bytes."""

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """Return the files of this machine that it is read from, where they are known."""

    @abstractmethod
    def _cut(self) -> Iterator[Block]: ...


class FileSource(Source):
    """A source that is one file, whose records have named fields.

    Args:
        path: the file.
        options: how it is read.

    Raises:
        DataError: there is no such file, or it is empty.
    """

    uses = COLUMN_OPTIONS | {"format"}

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.options = options
        self.name = show_path(path)
        try:
            self.n_bytes = path.stat().st_size
        except OSError as error:
            raise cannot_read(path, error) from error
        if not path.is_file():
            raise DataError(f"cannot read {self.name}: it is neither a file nor a folder")
        if self.n_bytes == 0:
            raise NoDocumentsError(f"{self.name} is empty")

    def describe(self) -> SourceIdentity:
        """Return path, size and hash."""
        assert self.n_bytes is not None
        return SourceIdentity(self.name, self.n_bytes, hash_file(self.path))

    def files(self) -> Sequence[Path]:
        """Return the one file."""
        return [self.path]


def hash_file(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise cannot_read(path, error) from error


def show_path(path: Path | str) -> str:
    """Return the name of a file as valid Unicode: a byte that is not UTF-8 becomes a backslash, x and its hex.

    A name may hold any byte, while errors, domains and the sidecar are UTF-8.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def cannot_read(path: Path, error: OSError | RuntimeError) -> DataError:
    """Make the error for a file that the system does not give."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return DataError(f"cannot read {show_path(path)}: {reason}")
