"""Rows of a table: what parquet, csv and datasets have in common."""

from collections.abc import Iterator
from typing import NamedTuple

from rwkv_train.data.sources.base import BadRecord, Document, Record, SourceOptions
from rwkv_train.data.sources.values import decode, domain_of_field, domain_of_meta, show_names, text_of
from rwkv_train.errors import DataError


class Row(NamedTuple):
    """Two values of a row, as the table has them; bytes stand for text that was not decoded yet."""

    number: int
    text: object
    domain: object
    fields: dict[str, object] | None = None
    """All values by column, where the source was opened for whole records."""


class RowBlock(NamedTuple):
    """Rows to check."""

    where: str
    """The file and what its rows are called: "corpus.csv, line"."""
    rows: tuple[Row | BadRecord, ...]
    """In order; a row that could not be cut into fields is bad already."""
    options: SourceOptions
    n_bytes: int

    def records(self) -> Iterator[Document | BadRecord]:
        """Yield a document for each row that holds one."""
        domain_of = domain_of_meta if self.options.domain_column is None else domain_of_field
        for row in self.rows:
            if isinstance(row, BadRecord):
                yield row
                continue
            try:
                yield Document(text_of(row.text, self.options.text_column), domain_of(row.domain))
            except DataError as error:
                yield BadRecord(f"{self.where} {row.number}", str(error))

    def whole_records(self) -> Iterator[Record | BadRecord]:
        """Yield each row with all its columns."""
        for row in self.rows:
            if isinstance(row, BadRecord):
                yield row
                continue
            assert row.fields is not None, "the source was not opened for whole records"
            where = f"{self.where} {row.number}"
            try:
                yield Record(where, {name: _decoded(value) for name, value in row.fields.items()})
            except DataError as error:
                yield BadRecord(where, str(error))


def _decoded(value: object) -> object:
    return decode(value) if isinstance(value, bytes) else value


def require_columns(name: str, columns: list[str], options: SourceOptions) -> str | None:
    """Return the column of the domain, or ``None`` where there is none.

    Args:
        name: of the table, for the error.
        columns: what it has.
        options: which are wanted.

    Raises:
        DataError: a column that is wanted is not there, or is there twice.
    """
    wanted = {"--text-column": options.text_column, "--domain-column": options.domain_column or "meta"}
    for option, column in wanted.items():
        count = columns.count(column)
        if count == 1 or (count == 0 and option == "--domain-column" and options.domain_column is None):
            continue
        raise DataError(
            f"{name} has {'no column' if count == 0 else f'{count} columns'} {column!r}; there are "
            f"{show_names(columns)}: choose another one with {option}"
        )
    return wanted["--domain-column"] if wanted["--domain-column"] in columns else None


def require_each_once(name: str, columns: list[str]) -> list[str]:
    """Return the columns of a table, of which no two may have one name.

    Raises:
        DataError: two have.
    """
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise DataError(f"{name} has {columns.count(twice[0])} columns {twice[0]!r}: rename all but one")
    return columns
