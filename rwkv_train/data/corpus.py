"""Read documents from text files: the Pile's JSON lines, plain or compressed, and plain text."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import encode_utf8

UNKNOWN_DOMAIN = "unknown"
"""Domain of a document that names none."""

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt")
"""Endings of the files that can be read."""

_CHUNK_BYTES = 1 << 17
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8; it is no text


class Document(NamedTuple):
    """One text, which is tokenized and evaluated on its own."""

    text: str
    domain: str
    """``meta.pile_set_name``, the stem of a .txt file, or "unknown"."""


def read_documents(
    paths: Sequence[Path], *, keep_empty: bool = False, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """Yield the documents of files, in order, in constant memory.

    A JSON lines file holds one object a line: its ``"text"`` is the document, its ``meta.pile_set_name`` the
    domain (``meta`` may be an object or, as in some copies of the Pile, a string that holds one). Blank lines
    are skipped. A .txt file is one document.

    Args:
        paths: files that end in one of ``SUFFIXES``.
        keep_empty: yield documents without any text too, instead of skipping them.
        on_bytes: called with the number of bytes of the file that were read (as it lies on disk) since
            the last call.

    Raises:
        DataError: a file is missing, empty, cut off or of another kind, or a line is not what it should be;
            the message names the file and the line.
    """
    for path in paths:
        for document in _read_file(path, on_bytes or (lambda n_bytes: None)):
            if document.text or keep_empty:
                yield document


def _read_file(path: Path, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: cannot tell the format; wanted a name that ends in {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise DataError(f"{path} is empty")
            file.seek(0)
            n_read = 0
            for document in _read_text(path, file) if path.suffix == ".txt" else _read_json_lines(path, file):
                on_bytes(file.tell() - n_read)
                n_read = file.tell()
                yield document
            on_bytes(file.tell() - n_read)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read_text(path: Path, file: BinaryIO) -> Iterator[Document]:
    data = file.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error
    yield Document(text, path.stem)


def _read_json_lines(path: Path, file: BinaryIO) -> Iterator[Document]:
    n_documents = 0
    for number, line in enumerate(_lines(path, file), start=1):
        if line.isspace():
            continue
        yield _parse_line(line, f"{path}, line {number}")
        n_documents += 1
    if n_documents == 0:
        raise DataError(f"{path} holds no documents")


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their ends. Only a line feed ends one: U+2028 and others are text in JSON."""
    stream: io.BufferedIOBase | BinaryIO
    if path.name.endswith(".zst"):
        stream = io.BufferedReader(_ZstdStream(file, path), _CHUNK_BYTES)
    elif path.name.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=file)
    else:
        stream = file
    try:
        first = stream.readline()
        yield first.removeprefix(_BYTE_ORDER_MARK) or b"\n"
        yield from stream
    except EOFError as error:
        raise DataError(f"{path} is cut off: its last gzip member is not complete") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} is damaged or not compressed as its name says: {error}") from error


class _ZstdStream(io.RawIOBase):
    """Decompress all frames of a file. The library's own reader takes a cut-off file for a complete one."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        # The window of `zstd --long=31`, the largest there is; the memory is taken only where it is used.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._is_inside_frame = False
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the stubs' Buffer is wider
        while not self._text:
            self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._is_inside_frame:
                    raise DataError(f"{self._path} is cut off: its last zstd frame is not complete")
                return 0
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            self._is_inside_frame = not self._frame.eof
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
        n_bytes = min(len(buffer), len(self._text))
        buffer[:n_bytes] = self._text[:n_bytes]
        self._text = self._text[n_bytes:]
        return n_bytes


def _parse_line(line: bytes, where: str) -> Document:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON that can be read: it is nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f'{where}: wanted an object with "text", found a {type(record).__name__}')
    if "text" not in record:
        raise DataError(f'{where}: the object has no "text"')
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f'{where}: "text" must be a string, found {type(text).__name__}')
    try:
        encode_utf8(text)  # JSON can spell half a surrogate pair
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return Document(text, _domain(record.get("meta")))


def _domain(meta: object) -> str:
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            return UNKNOWN_DOMAIN  # a remark, not the Pile's object
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name else UNKNOWN_DOMAIN
