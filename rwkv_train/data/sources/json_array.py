"""A JSON file that is one list of objects, as many chat datasets are published. It is read whole."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from rwkv_train.data.sources.base import (
    MAX_RECORD_BYTES,
    BadRecord,
    Block,
    Document,
    FileSource,
    NoDocumentsError,
    Record,
    SourceOptions,
    cannot_read,
)
from rwkv_train.data.sources.json_lines import document_of, require_object
from rwkv_train.data.sources.values import decode
from rwkv_train.errors import DataError

_BLOCK_RECORDS = 1 << 12
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonArraySource(FileSource):
    """A ``.json`` file with a list of objects; they are counted from 1.

    In a folder such files are left out, since most are something else: this one is opened by its own name.
    """

    def _cut(self) -> Iterator[Block]:
        assert self.n_bytes is not None
        entries = self._load()
        if not entries:
            raise NoDocumentsError(f"{self.name} holds no documents")
        n_before = 0
        for start in range(0, len(entries), _BLOCK_RECORDS):
            block = tuple(entries[start : start + _BLOCK_RECORDS])
            share = self.n_bytes * (start + len(block)) // len(entries) - n_before
            n_before += share
            yield JsonArrayBlock(self.name, start + 1, block, self.options, share)

    def _load(self) -> list[object]:
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_RECORD_BYTES + 1)
        except OSError as error:
            raise cannot_read(self.path, error) from error
        if len(data) > MAX_RECORD_BYTES:
            raise DataError(
                f"{self.name} is longer than {MAX_RECORD_BYTES} bytes, and a list is read whole: write it as JSON lines"
            )
        try:
            entries = json.loads(decode(data.removeprefix(_BYTE_ORDER_MARK)))
        except json.JSONDecodeError as error:
            hint = ""
            if error.msg == "Extra data":
                hint = "; it looks like JSON lines, whose format is 'jsonl' (--format; in data.datasets: file_format)"
            raise DataError(f"{self.name}, line {error.lineno}: not JSON: {error.msg}{hint}") from error
        except (DataError, ValueError, RecursionError) as error:
            raise DataError(f"{self.name}: not JSON that can be read: {error}") from error
        if not isinstance(entries, list):
            raise DataError(f"{self.name}: wanted a list of objects, found a {type(entries).__name__}")
        return entries


class JsonArrayBlock(NamedTuple):
    """Some entries of the list."""

    name: str
    first: int
    """Number of the first one, counted from 1."""
    entries: tuple[object, ...]
    options: SourceOptions
    n_bytes: int

    def records(self) -> Iterator[Document | BadRecord]:
        """Yield a document for each entry that holds one."""
        for record in self.whole_records():
            if isinstance(record, BadRecord):
                yield record
                continue
            try:
                yield document_of(record.fields, self.options)
            except DataError as error:
                yield BadRecord(record.where, str(error))

    def whole_records(self) -> Iterator[Record | BadRecord]:
        """Yield each entry that is an object."""
        for number, entry in enumerate(self.entries, start=self.first):
            where = f"{self.name}, record {number}"
            try:
                yield Record(where, require_object(entry, "the fields of a record"))
            except DataError as error:
                yield BadRecord(where, str(error))
