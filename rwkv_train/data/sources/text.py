"""Plain text: a file is a document."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.sources.base import (
    BLOCK_BYTES,
    MAX_RECORD_BYTES,
    BadRecord,
    Block,
    Document,
    FileSource,
    Record,
    cannot_read,
    show_path,
)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextFile(NamedTuple):
    """A file that is one document."""

    path: Path
    domain: str
    n_bytes: int


class TextSource(FileSource):
    """A ``.txt`` or ``.md`` file; its domain is the file's name without the ending."""

    uses = frozenset({"format"})

    def _cut(self) -> Iterator[Block]:
        assert self.n_bytes is not None
        yield TextBlock((TextFile(self.path, show_path(self.path.stem), self.n_bytes),))


class TextBlock(NamedTuple):
    """Some files; they are opened where the block is parsed."""

    files: tuple[TextFile, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the files."""
        return sum(file.n_bytes for file in self.files)

    def records(self) -> Iterator[Document | BadRecord]:
        """Yield a document for each file."""
        return map(_read, self.files)

    def whole_records(self) -> Iterator[Record | BadRecord]:
        """Yield each file as a record with the one field "text"."""
        for file in self.files:
            document = _read(file)
            if isinstance(document, BadRecord):
                yield document
            else:
                yield Record(show_path(file.path), {"text": document.text})


def group_text_files(files: Iterator[TextFile]) -> Iterator[TextBlock]:
    """Put small files together, to about ``BLOCK_BYTES``."""
    group: list[TextFile] = []
    n_bytes = 0
    for file in files:
        group.append(file)
        n_bytes += file.n_bytes
        if n_bytes >= BLOCK_BYTES:
            yield TextBlock(tuple(group))
            group, n_bytes = [], 0
    if group:
        yield TextBlock(tuple(group))


def _read(file: TextFile) -> Document | BadRecord:
    try:
        with file.path.open("rb") as stream:
            data = stream.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise cannot_read(file.path, error) from error
    if len(data) > MAX_RECORD_BYTES:
        return BadRecord(
            show_path(file.path),
            f"a text file is one document, of at most {MAX_RECORD_BYTES} bytes: divide it",
        )
    data = data.removeprefix(_BYTE_ORDER_MARK)
    try:
        return Document(data.decode(), file.domain)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadRecord(
            f"{show_path(file.path)}, line {line}", f"not UTF-8 (byte 0x{data[error.start]:02x})"
        )
