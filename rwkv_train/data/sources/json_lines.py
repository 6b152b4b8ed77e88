"""JSON lines, as the Pile comes: one object a line with its text and, in ``meta``, its domain."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from rwkv_train.data.sources.base import (
    BadRecord,
    Block,
    Document,
    FileSource,
    NoDocumentsError,
    Record,
    SourceOptions,
    show_path,
)
from rwkv_train.data.sources.lines import Lines, cut_lines
from rwkv_train.data.sources.values import decode, domain_of_field, domain_of_meta, text_of
from rwkv_train.errors import DataError


class JsonLinesSource(FileSource):
    """A ``.jsonl``, ``.jsonl.zst`` or ``.jsonl.gz`` file; blank lines are passed over."""

    def _cut(self) -> Iterator[Block]:
        has_records = False
        for lines in cut_lines(self.path):
            has_records = has_records or not (lines.data.isspace() or not lines.data)
            yield JsonLinesBlock(lines, self.options)
        if not has_records:
            raise NoDocumentsError(f"{self.name} holds no documents")


class JsonLinesBlock(NamedTuple):
    """Lines to parse."""

    lines: Lines
    options: SourceOptions

    @property
    def n_bytes(self) -> int:
        """See :class:`~rwkv_train.data.sources.base.Block`."""
        return self.lines.n_bytes

    def records(self) -> Iterator[Document | BadRecord]:
        """Yield a document for each line that holds one."""
        for where, line in self._lines():
            try:
                yield document_of(_parse(line, f'"{self.options.text_column}"'), self.options)
            except DataError as error:
                yield BadRecord(where, str(error))

    def whole_records(self) -> Iterator[Record | BadRecord]:
        """Yield each line that is an object."""
        for where, line in self._lines():
            try:
                yield Record(where, _parse(line, "the fields of a record"))
            except DataError as error:
                yield BadRecord(where, str(error))

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        for number, line in enumerate(self.lines.data.split(b"\n"), start=self.lines.first):
            if line and not line.isspace():
                yield f"{show_path(self.lines.path)}, line {number}", line


def document_of(record: dict[str, object], options: SourceOptions) -> Document:
    """Return the document that an object holds.

    Raises:
        DataError: it has no text, or what it has is none.
    """
    key = options.text_column
    if key not in record:
        raise DataError(f'the object has no "{key}"')
    if options.domain_column is None:
        return Document(text_of(record[key], key), domain_of_meta(record.get("meta")))
    return Document(text_of(record[key], key), domain_of_field(record.get(options.domain_column)))


def require_object(value: object, wanted: str) -> dict[str, object]:
    """Return a value of JSON that is an object; else a DataError says what it should hold."""
    if not isinstance(value, dict):
        raise DataError(f"wanted an object with {wanted}, found a {type(value).__name__}")
    return value


def _parse(line: bytes, wanted: str) -> dict[str, object]:
    try:
        return require_object(json.loads(decode(line)), wanted)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise DataError("not JSON that can be read: it is nested too deeply") from error
