"""JSON lines, as the Pile comes: one object a line with its text and, in ``meta``, its domain."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from rwkv_train.data.sources.base import (
    UNKNOWN_DOMAIN,
    BadRecord,
    Block,
    Document,
    FileSource,
    SourceOptions,
)
from rwkv_train.data.sources.lines import Lines, cut_lines
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import encode_utf8


class JsonLinesSource(FileSource):
    """A ``.jsonl``, ``.jsonl.zst`` or ``.jsonl.gz`` file; blank lines are passed over."""

    def _cut(self) -> Iterator[Block]:
        has_records = False
        for lines in cut_lines(self.path):
            has_records = has_records or not (lines.data.isspace() or not lines.data)
            yield JsonLinesBlock(lines, self.options)
        if not has_records:
            raise DataError(f"{self.path} holds no documents")


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
        for number, line in enumerate(self.lines.data.split(b"\n"), start=self.lines.first):
            if line and not line.isspace():
                try:
                    yield _parse(line, self.options)
                except DataError as error:
                    yield BadRecord(f"{self.lines.path}, line {number}", str(error))


def domain_of_meta(meta: object) -> str:
    """Return ``pile_set_name`` of a ``meta``, an object or (in some copies of the Pile) a string that holds one."""
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            return UNKNOWN_DOMAIN  # a remark, not the Pile's object
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name else UNKNOWN_DOMAIN


def _parse(line: bytes, options: SourceOptions) -> Document:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte 0x{line[error.start]:02x})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise DataError("not JSON that can be read: it is nested too deeply") from error
    key = options.text_column
    if not isinstance(record, dict):
        raise DataError(f'wanted an object with "{key}", found a {type(record).__name__}')
    if key not in record:
        raise DataError(f'the object has no "{key}"')
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f'"{key}" must be a string, found {type(text).__name__}')
    domain = _domain(record, options.domain_column)
    if b"\\u" in line:  # the only way in which a line of UTF-8 can spell half a surrogate pair
        encode_utf8(text)
        encode_utf8(domain)
    return Document(text, domain)


def _domain(record: dict[str, object], column: str | None) -> str:
    if column is None:
        return domain_of_meta(record.get("meta"))
    value = record.get(column)
    return value if isinstance(value, str) and value else UNKNOWN_DOMAIN
