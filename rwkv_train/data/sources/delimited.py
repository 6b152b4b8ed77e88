"""Comma- or tab-separated values with a header: quoted fields may hold line ends."""

import csv
from collections.abc import Iterator
from pathlib import Path

from rwkv_train.data.sources.base import (
    BLOCK_BYTES,
    MAX_RECORD_BYTES,
    BadRecord,
    Block,
    FileSource,
    NoDocumentsError,
    SourceOptions,
    show_path,
)
from rwkv_train.data.sources.lines import cut_lines
from rwkv_train.data.sources.rows import Row, RowBlock, require_columns, require_each_once
from rwkv_train.errors import DataError


class DelimitedSource(FileSource):
    """A ``.csv`` or ``.tsv`` file; a record is named by the line it begins in.

    Fields are quoted with ``"``, which is doubled within them. All records have as many fields as the header.

    Args:
        path: the file.
        options: the columns.

    Raises:
        DataError: it is missing, empty, or lacks a column.
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        super().__init__(path, options)
        _Reader(path, options)  # looks at the header

    def _cut(self) -> Iterator[Block]:
        assert self.n_bytes is not None
        reader = _Reader(self.path, self.options)
        where = f"{self.name}, line"
        rows: list[Row | BadRecord] = []
        n_raw, n_bytes = 0, 0
        for row in reader.rows():
            rows.append(row)
            if reader.n_raw - n_raw >= BLOCK_BYTES:
                yield RowBlock(where, tuple(rows), self.options, reader.n_stored - n_bytes)
                rows, n_raw, n_bytes = [], reader.n_raw, reader.n_stored
        if reader.n_rows == 0:
            raise NoDocumentsError(f"{self.name} holds no documents")
        yield RowBlock(where, tuple(rows), self.options, self.n_bytes - n_bytes)


class _Reader:
    """The rows of a file, with the header read."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        csv.field_size_limit(MAX_RECORD_BYTES)  # of the whole process; there is no other way
        self.n_rows = 0
        self.n_raw = 0  # bytes of the lines that were given to the parser
        self.n_stored = 0  # bytes of the file that were read for them
        self._path = path
        self._name = show_path(path)
        delimiter = "\t" if ".tsv" in map(str.lower, path.suffixes) else ","
        self._reader = csv.reader(self._lines(), delimiter=delimiter, strict=True)
        header = self._read_header()
        self._n_fields = len(header)
        self._columns = require_each_once(self._name, header) if options.whole_records else None
        if self._columns is not None:
            return
        domain_column = require_columns(self._name, header, options)
        self._text = header.index(options.text_column)
        self._domain = None if domain_column is None else header.index(domain_column)

    def rows(self) -> Iterator[Row | BadRecord]:
        """Yield each record that is no empty line."""
        number = self._reader.line_num + 1
        while (fields := self._next()) is not None:
            if fields:
                yield self._row(fields, number)
                self.n_rows += 1
            number = self._reader.line_num + 1

    def _read_header(self) -> list[str]:
        fields = self._next()
        while fields == []:
            fields = self._next()
        if fields is None:
            raise NoDocumentsError(f"{self._name} holds no documents")
        if isinstance(fields, BadRecord):
            raise DataError(str(fields))
        if any("\0" in field for field in fields):
            raise DataError(f"{self._name}: the header holds NUL bytes: it is damaged, or not UTF-8")
        return fields

    def _row(self, fields: list[str] | BadRecord, number: int) -> Row | BadRecord:
        where = f"{self._name}, line {number}"
        if isinstance(fields, BadRecord):
            return fields
        if len(fields) != self._n_fields:
            return BadRecord(where, f"{len(fields)} fields, wanted {self._n_fields} as in the header")
        if any("\0" in field for field in fields):
            return BadRecord(where, "holds NUL bytes: it is damaged, or not UTF-8")
        if self._columns is not None:
            return Row(number, None, None, dict(zip(self._columns, map(_as_read, fields), strict=True)))
        domain = None if self._domain is None else _as_read(fields[self._domain])
        return Row(number, _as_read(fields[self._text]), domain)

    def _next(self) -> list[str] | BadRecord | None:
        number = self._reader.line_num + 1
        try:
            return next(self._reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise DataError(
                    f"{self._name}, line {number}: a quote is opened here and not closed: the file is cut off, or the "
                    f"quote is no quote; {self.n_rows} whole rows come before that"
                ) from error
            return BadRecord(f"{self._name}, line {number}", f"not to be cut into fields: {error}")

    def _lines(self) -> Iterator[str]:
        for lines in cut_lines(self._path):
            self.n_stored += lines.n_bytes
            for line in lines.data.splitlines(
                keepends=True
            ):  # of bytes: only at line feeds and carriage returns
                self.n_raw += len(line)
                yield line.decode("utf-8", "surrogateescape")


def _as_read(field: str) -> bytes:
    """Return the bytes of a field, which are checked where they are parsed."""
    return field.encode("utf-8", "surrogateescape")
