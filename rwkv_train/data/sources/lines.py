"""Cut files at their line ends, plain or compressed, in bounded memory."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from rwkv_train.data.sources.base import BLOCK_BYTES, MAX_RECORD_BYTES, cannot_read, show_path
from rwkv_train.errors import DataError

_PIECE_BYTES = 1 << 20
_ZSTD_PIECE_BYTES = 1 << 13  # 256 MiB of text at most: a block of 128 KiB can be written in four bytes
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8; it is no text


class Lines(NamedTuple):
    """Whole lines of a file."""

    path: Path
    first: int
    """Number of the first one, counted from 1."""
    data: bytes
    """With their ends; only the last line of the file may have none. Only a line feed ends a line."""
    n_bytes: int
    """Of the file, as stored, that were read for them."""


def cut_lines(path: Path) -> Iterator[Lines]:
    """Yield the lines of a file in blocks of about ``BLOCK_BYTES``; ``.zst`` and ``.gz`` are decompressed.

    The text decides alone where it is cut. A last block may be without lines: then it accounts for the rest of
    a compressed file.

    Raises:
        DataError: the file cannot be read, is cut off or damaged, or has a line of more than
            ``MAX_RECORD_BYTES``; raised after the whole lines before that were yielded.
    """
    try:
        with path.open("rb") as file:
            yield from _cut(path, file)
    except OSError as error:
        raise cannot_read(path, error) from error


def _cut(path: Path, file: BinaryIO) -> Iterator[Lines]:
    line, n_read = 1, 0
    held: list[bytes] = []  # the begin of the next block
    n_held = 0
    damage: DataError | None = None
    try:
        for piece in _pieces(path, file):
            end = piece.rfind(b"\n") + 1
            if n_held + len(piece) >= BLOCK_BYTES and end:
                lines = Lines(path, line, b"".join([*held, piece[:end]]), file.tell() - n_read)
                yield lines
                line += lines.data.count(b"\n")
                n_read += lines.n_bytes
                held, n_held = [], 0
            else:
                end = 0
            held.append(piece[end:])
            n_held += len(piece) - end
            if n_held > MAX_RECORD_BYTES:
                raise DataError(
                    f"{show_path(path)} has a line of more than {MAX_RECORD_BYTES} bytes: is it of this format?"
                )
    except DataError as error:
        damage = error
    if damage:  # whole lines only
        while held and b"\n" not in held[-1]:
            held.pop()
        held[-1:] = [piece[: piece.rfind(b"\n") + 1] for piece in held[-1:]]
    rest = b"".join(held)
    if rest or file.tell() > n_read:
        yield Lines(path, line, rest, file.tell() - n_read)
    if damage:
        n_whole = line - 1 + rest.count(b"\n")
        raise DataError(f"{damage}; {n_whole} whole lines come before that") from damage


def _pieces(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed content in bounded pieces, without a byte order mark."""
    decompress = {".zst": _zstd_pieces, ".gz": _gzip_pieces}.get(path.suffix.lower(), _plain_pieces)
    try:
        pieces = decompress(path, file)
        first = next(pieces, b"")
        while len(first) < len(_BYTE_ORDER_MARK) and (more := next(pieces, b"")):
            first += more
        yield first.removeprefix(_BYTE_ORDER_MARK)
        yield from pieces
    except EOFError as error:
        raise DataError(f"{show_path(path)} is cut off: its last gzip member is not complete") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{show_path(path)} is damaged or not compressed as its name says: {error}"
        ) from error


def _plain_pieces(_path: Path, file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece


def _gzip_pieces(_path: Path, file: BinaryIO) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=file)
    while piece := stream.read1(_PIECE_BYTES):
        yield piece


def _zstd_pieces(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Decompress all frames. The library's own reader takes a cut-off file for a complete one."""
    # The window of `zstd --long=31`, the largest there is; the memory is taken only where it is used.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    is_inside_frame = False
    while stored := file.read(_ZSTD_PIECE_BYTES):
        while stored:
            if piece := frame.decompress(stored):
                yield piece
            stored = frame.unused_data
            is_inside_frame = not frame.eof
            if frame.eof:
                frame = decompressor.decompressobj()
    if is_inside_frame:
        raise DataError(f"{show_path(path)} is cut off: its last zstd frame is not complete")
