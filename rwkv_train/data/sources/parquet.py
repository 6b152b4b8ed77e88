"""Parquet, row group by row group; only the columns that are needed are read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from rwkv_train.data.sources.base import (
    BLOCK_BYTES,
    Block,
    FileSource,
    NoDocumentsError,
    SourceOptions,
    show_path,
)
from rwkv_train.data.sources.rows import Row, RowBlock, require_columns, require_each_once
from rwkv_train.errors import DataError

_MAX_ROWS = 1 << 12  # of a block: a dictionary may make many long texts of few bytes
_BUFFER_BYTES = 1 << 20  # read a column page by page, not whole
_TEXT_TYPES = {
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()
}  # fmt: skip


class ParquetSource(FileSource):
    """A ``.parquet`` file with a column of text; numbers of rows count from 1.

    Args:
        path: the file.
        options: the columns.

    Raises:
        DataError: it is missing, empty, damaged or cut off, or lacks a column.
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        super().__init__(path, options)
        with _guarded(path), self._open() as file:
            schema = file.schema_arrow
            self._domain_column: str | None = None
            if options.whole_records:
                require_each_once(self.name, schema.names)
                return
            self._domain_column = require_columns(self.name, schema.names, options)
            self._require_type(schema.field(options.text_column), "--text-column", _is_text)
            if options.domain_column is not None:
                self._require_type(schema.field(options.domain_column), "--domain-column", _is_domain)

    def _cut(self) -> Iterator[Block]:
        assert self.n_bytes is not None
        n_rows = 0
        n_bytes = 0
        with _guarded(self.path), self._open() as file:
            n_total = file.metadata.num_rows
        batches = self._batches()
        while True:
            with _guarded(self.path, n_rows):
                batch = next(batches, None)
                if batch is None:
                    break
                rows = tuple(self._rows(batch, n_rows))
            n_rows += len(rows)
            # A row's share of the file: the whole file when all rows are read.
            share = self.n_bytes * n_rows // max(n_total, n_rows) - n_bytes
            n_bytes += share
            yield RowBlock(f"{self.name}, row", rows, self.options, share)
        if n_rows == 0:
            raise NoDocumentsError(f"{self.name} holds no documents")
        if n_rows != n_total:
            raise DataError(f"{self.name} is damaged: it tells of {n_total} rows and holds {n_rows}")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self._open() as file:
            columns = [name for name in (self.options.text_column, self._domain_column) if name is not None]
            if self.options.whole_records:
                columns = file.schema_arrow.names
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                of_columns = (metadata.column(index) for index in range(metadata.num_columns))
                n_bytes = sum(
                    column.total_uncompressed_size
                    for column in of_columns
                    if column.path_in_schema.split(".", 1)[0] in columns
                )
                n_rows = min(max(BLOCK_BYTES * metadata.num_rows // max(n_bytes, 1), 1), _MAX_ROWS)
                yield from file.iter_batches(n_rows, row_groups=[group], columns=columns, use_threads=False)

    def _rows(self, batch: pa.RecordBatch, n_before: int) -> Iterator[Row]:
        if self.options.whole_records:
            for number, fields in enumerate(batch.to_pylist(), start=n_before + 1):
                yield Row(number, None, None, fields)
            return
        texts = _values(batch.column(self.options.text_column))
        domains = (
            [None] * len(texts) if self._domain_column is None else _values(batch.column(self._domain_column))
        )
        for number, (text, domain) in enumerate(zip(texts, domains, strict=True), start=n_before + 1):
            yield Row(number, text, domain)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False)

    def _require_type(self, field: pa.Field, option: str, is_right: Callable[[pa.DataType], bool]) -> None:
        if not is_right(field.type):
            raise DataError(
                f"{self.name}: the column '{field.name}' is of type {field.type}, wanted string; choose another one "
                f"with {option}"
            )


@contextmanager
def _guarded(path: Path, n_rows: int | None = None) -> Iterator[None]:
    """Turn what pyarrow raises into one sentence, with the number of rows that were read before."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        before = "" if n_rows is None else f"; {n_rows} whole rows come before that"
        raise DataError(
            f"{show_path(path)} is damaged, cut off or no parquet file: {_one_line(error)}{before}"
        ) from error


def _values(column: pa.Array) -> list[object]:
    """Return text as bytes, which are checked where they are parsed; numbers as they are."""
    if pa.types.is_struct(column.type):
        if "pile_set_name" not in column.type.names:
            return [None] * len(column)
        return [{"pile_set_name": name} for name in _values(pc.struct_field(column, "pile_set_name"))]
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif not pa.types.is_integer(column.type):
        return [None] * len(column)
    values: list[object] = column.to_pylist()
    return values


def _is_text(kind: pa.DataType) -> bool:
    """Say whether a column holds strings; some writers forget to say that their bytes are text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in _TEXT_TYPES


def _is_domain(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind) or pa.types.is_struct(kind))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
