r"""Tokens on disk: the ``.bin/.idx`` pair of Megatron, which RWKV's and other trainers read and write.

The .bin file holds the ids of all documents one after another. The .idx file, little-endian without padding:

======== ======= ==========================================================================================
offset   bytes   content
======== ======= ==========================================================================================
0        9       ``b"MMIDIDX\0\0"``
9        8       uint64 version, 1
17       1       uint8 code of the ids' type, see ``DTYPES``
18       8       uint64 S, the number of sequences
26       8       uint64 D, the number of documents *plus one*
34       4 S     int32 length of each sequence, in tokens
34+4S    8 S     int64 offset of each sequence in the .bin file, in bytes
34+12S   8 D     int64 number of the sequence each document starts with; the last is S
======== ======= ==========================================================================================

Files for several kinds of input have S more bytes at the end, which are ignored.

Source:
    Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``; RWKV-LM, ``binidx.py``.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from rwkv_train.data.atomic import AtomicFiles
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import TokenArray

DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Types of token ids by their code."""

_FLOATING_POINT = (6, 7)
"""Codes of other types; programs disagree which is which."""

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # entries of a table handled at once


def add_suffix(prefix: Path, suffix: str) -> Path:
    """Return the file ``PREFIX + suffix``; a prefix may itself hold dots.

    Raises:
        DataError: the prefix is a folder and no more, like "." or "/".
    """
    if prefix.name in ("", ".."):
        raise DataError(f"'{prefix}' is no prefix of files; wanted a path that ends in the begin of a name")
    return prefix.with_name(prefix.name + suffix)


class TokenFile:
    """A ``.bin/.idx`` pair, memory-mapped: opening it reads no tokens.

    Args:
        prefix: path of the pair without its endings.

    Raises:
        DataError: a file is missing, of another format, cut off, or the two disagree; with the numbers.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._idx_path, self._bin_path = add_suffix(prefix, ".idx"), add_suffix(prefix, ".bin")
        idx_bytes, bin_bytes = (_file_bytes(path, prefix) for path in (self._idx_path, self._bin_path))
        code, n_sequences, n_starts = self._read_header(idx_bytes)
        self.dtype: np.dtype[np.integer] = np.dtype(DTYPES[code])
        end = _HEADER.size + 12 * n_sequences + 8 * n_starts
        if idx_bytes not in (end, end + n_sequences):
            raise DataError(
                f"{self._idx_path} is damaged or cut off: it has {idx_bytes} bytes, and {n_sequences} "
                f"sequences and {n_starts - 1} documents need {end}"
            )
        if bin_bytes == 0 or n_sequences == 0:
            raise DataError(f"{self._bin_path} holds no tokens")
        self.tokens: TokenArray = self._map(self._bin_path, self.dtype, bin_bytes // self.dtype.itemsize, 0)
        self._sizes = self._map(self._idx_path, "<i4", n_sequences, _HEADER.size)
        self._offsets = self._map(self._idx_path, "<i8", n_sequences, _HEADER.size + 4 * n_sequences)
        self._starts = self._map(self._idx_path, "<i8", n_starts, _HEADER.size + 12 * n_sequences)
        self._check_tables(bin_bytes)

    @classmethod
    def open(cls, prefix: Path) -> Self:
        """Open the pair ``PREFIX.bin``, ``PREFIX.idx``."""
        return cls(prefix)

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        # A copy for another process opens the files again; pickling the map would copy all tokens.
        return (type(self), (self.prefix,))

    @property
    def n_tokens(self) -> int:
        """Tokens in the .bin file."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Documents, each of one sequence or more."""
        return len(self._starts) - 1

    def document_span(self, index: int) -> tuple[int, int]:
        """Return where a document begins and ends in ``tokens``."""
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents}")
        first, last = (
            self._first_token(int(self._starts[index])),
            self._first_token(int(self._starts[index + 1])),
        )
        return first, last

    def document(self, index: int) -> TokenArray:
        """Return the tokens of a document, its end token included, without copying them."""
        start, end = self.document_span(index)
        return self.tokens[start:end]

    def _first_token(self, sequence: int) -> int:
        if sequence == len(self._offsets):
            return self.n_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def _read_header(self, idx_bytes: int) -> tuple[int, int, int]:
        path = self._idx_path
        if idx_bytes < _HEADER.size:
            raise DataError(f"{path} is cut off: it has {idx_bytes} bytes, its header alone {_HEADER.size}")
        with path.open("rb") as file:
            magic, version, code, n_sequences, n_starts = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC:
            raise DataError(f"{path} is no Megatron index: it starts with {magic!r}, wanted {_MAGIC!r}")
        if version != _VERSION:
            raise DataError(f"{path} has version {version} of the format, wanted {_VERSION}")
        if code not in DTYPES:
            known = ", ".join(f"{code} ({np.dtype(name).name})" for code, name in DTYPES.items())
            told = "floating point, and token ids are integers" if code in _FLOATING_POINT else "not known"
            raise DataError(
                f"{path} has tokens of type code {code}, which is {told}: wanted one of {known}; write the pair again "
                "with such a type"
            )
        if n_starts == 0:
            raise DataError(f"{path} is damaged: its table of documents is empty")
        return code, n_sequences, n_starts

    def _map(self, path: Path, dtype: npt.DTypeLike, length: int, offset: int) -> TokenArray:
        try:
            return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(length,))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    def _check_tables(self, bin_bytes: int) -> None:
        """Hold the three tables against each other and against the .bin file, a piece at a time."""
        itemsize = self.dtype.itemsize
        end = 0  # of the sequence before, in bytes
        for chunk in _chunks(len(self._sizes)):
            sizes = self._sizes[chunk].astype(np.int64) * itemsize
            ends = end + np.cumsum(sizes)
            if (sizes < 0).any() or (self._offsets[chunk] != ends - sizes).any():
                raise DataError(
                    f"{self._idx_path} is damaged: its sequences {chunk.start} to {chunk.stop - 1} do not "
                    "follow one another without gaps"
                )
            end = int(ends[-1])
        if end != bin_bytes:
            raise DataError(
                f"{self._bin_path} has {bin_bytes} bytes, but its index tells of {end} ({end // itemsize} tokens "
                f"of {self.dtype.name}): one of the two is cut off or belongs elsewhere"
            )
        if self._starts[0] != 0 or self._starts[-1] != len(self._sizes):
            raise DataError(
                f"{self._idx_path} is damaged: its documents cover sequences {self._starts[0]} to "
                f"{self._starts[-1]}, wanted 0 to {len(self._sizes)}"
            )
        for chunk in _chunks(self.n_documents):
            if (np.diff(self._starts[chunk.start : chunk.stop + 1]) < 0).any():
                raise DataError(f"{self._idx_path} is damaged: its documents are not in order")


class TokenFileWriter:
    """Write a ``.bin/.idx`` pair document by document, in constant memory; both appear when complete.

    Left by an exception, it leaves nothing behind::

        with TokenFileWriter(prefix, np.uint16) as writer:
            writer.add_document(tokens)

    Args:
        prefix: path of the pair without its endings.
        dtype: type of the ids on disk, one of ``DTYPES``.
        overwrite: replace files that exist, instead of refusing.
        beside: endings of further files that belong to the pair and appear with it; see :meth:`file`.

    Raises:
        DataError: a file exists, the folder cannot be written, or the disk is full.
    """

    def __init__(
        self, prefix: Path, dtype: npt.DTypeLike, *, overwrite: bool = False, beside: Sequence[str] = ()
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._prefix = prefix
        # The index comes last: where it is, the rest is.
        paths = [add_suffix(prefix, suffix) for suffix in (".bin", *beside, ".idx")]
        self._files = AtomicFiles(paths, overwrite=overwrite)
        self._hash = hashlib.sha256()
        self.n_tokens = 0
        self.n_documents = 0

    def __enter__(self) -> Self:
        self._files.__enter__()
        self._index = IndexWriter(self.file(".idx"), self.dtype)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._index.finish()
            except OSError as problem:
                kind, error, traceback = type(problem), problem, problem.__traceback__
        self._files.__exit__(kind, error, traceback)

    @property
    def sha256(self) -> str:
        """Hash of the .bin file as far as it is written."""
        return self._hash.hexdigest()

    def file(self, suffix: str) -> BinaryIO:
        """Return the open file ``PREFIX + suffix``."""
        return self._files[add_suffix(self._prefix, suffix)]

    def add_document(self, tokens: npt.NDArray[np.integer]) -> None:
        """Append a document, its end token included.

        Raises:
            ValueError: it has no tokens, or an id does not fit the type.
            DataError: it has more tokens than the format can tell (2**31 - 1).
        """
        if tokens.size == 0:
            raise ValueError("a document without tokens")
        if tokens.size >= 1 << 31:
            raise DataError(f"a document has {tokens.size} tokens; the .idx format ends at {(1 << 31) - 1}")
        if tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(f"ids {tokens.min()} to {tokens.max()} do not fit {self.dtype.name}")
        data = tokens.astype(self.dtype).tobytes()
        self.file(".bin").write(data)
        self._index.add([tokens.size])
        self._hash.update(data)
        self.n_tokens += tokens.size
        self.n_documents += 1


class IndexWriter:
    """Write an .idx file whose documents are one sequence each.

    Args:
        file: opened for reading and writing, empty.
        dtype: type of the ids, one of ``DTYPES``.
    """

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike) -> None:
        self._file = file
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == self._dtype)
        self._n_documents = 0
        file.write(bytes(_HEADER.size))  # filled in at the end

    def add(self, sizes: npt.ArrayLike) -> None:
        """Append documents of so many tokens each, below 2**31."""
        sizes = np.asarray(sizes)
        self._file.write(sizes.astype("<i4").tobytes())
        self._n_documents += sizes.size

    def finish(self) -> None:
        """Append the other tables, computed from the lengths that are already in the file, and fill in the header."""
        offset = 0
        for chunk in _chunks(self._n_documents):
            self._file.seek(_HEADER.size + 4 * chunk.start)
            sizes = np.frombuffer(self._file.read(4 * (chunk.stop - chunk.start)), "<i4").astype(np.int64)
            ends = offset + np.cumsum(sizes * self._dtype.itemsize)
            self._file.seek(_HEADER.size + 4 * self._n_documents + 8 * chunk.start)
            self._file.write((ends - sizes * self._dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1])
        self._file.seek(_HEADER.size + 12 * self._n_documents)
        for chunk in _chunks(self._n_documents + 1):
            self._file.write(np.arange(chunk.start, chunk.stop, dtype="<i8").tobytes())
        self._file.seek(0)
        self._file.write(_HEADER.pack(_MAGIC, _VERSION, self._code, self._n_documents, self._n_documents + 1))


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK))


def _file_bytes(path: Path, prefix: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {_hint(prefix)}") from error


def _hint(prefix: Path) -> str:
    if prefix.suffix in (".bin", ".idx"):
        return f"pass the prefix {prefix.with_suffix('')}"
    if prefix.is_file():
        return f"make tokens of {prefix} with rwkv-train prepare-data, and pass the prefix of its --output"
    return "make it with rwkv-train prepare-data, or pass the prefix of a .bin/.idx pair"
