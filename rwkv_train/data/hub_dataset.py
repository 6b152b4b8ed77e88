"""A dataset of texts that Hugging Face's ``datasets`` reads: from the hub, a folder or files, row by row."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_train.config.data import DatasetConfig
from rwkv_train.errors import DataError

DatasetState = dict[str, Any]
"""Where a streamed dataset stands, as its library describes it: JSON's types."""

_SAVED_BY_LIBRARY = ("state.json", "dataset_dict.json")  # files that save_to_disk leaves in its folder

_KINDS_OF_FILES = ("json", "parquet", "csv", "text")  # for which the library would read all files around it

_META = "meta"  # the Pile's column, whose pile_set_name is the domain


class Row(NamedTuple):
    """One row of a dataset; its values are not looked at yet."""

    number: int
    """From 0, in the order of the dataset."""
    text: object
    domain: object
    """``None`` where the dataset has no column for it; that of ``meta`` where no column was chosen."""
    fields: dict[str, object] | None = None
    """All columns, where the dataset was opened for whole rows; then text and domain are ``None``."""


class TextDataset:
    """A dataset whose rows are read in order, from any row on.

    Args:
        spec: what it is called and where its text is.
        dataset: the library's dataset, of either kind.
        whole_rows: give all columns; then none has to be there.

    Raises:
        DataError: it has no such column.
    """

    def __init__(self, spec: DatasetConfig, dataset: Any, *, whole_rows: bool = False) -> None:
        self.spec = spec
        self._whole_rows = whole_rows
        known = dataset.column_names
        if whole_rows:
            known = []
        if known is None:  # a streamed dataset may learn its columns from its first row only
            known = list(next(_guarded(spec, iter(dataset)), {}))
        self._domain_column = spec.domain_column or (_META if _META in known else None)
        wanted = [
            name for name in (spec.text_column, self._domain_column) if name is not None and not whole_rows
        ]
        for column in wanted:
            if column not in known:
                raise DataError(
                    f"the dataset {show(spec)} has no column {column!r}; it has "
                    f"{', '.join(map(repr, known)) or 'none'}: name one in text_column and domain_column"
                )
        self._dataset = dataset if whole_rows else dataset.select_columns(list(dict.fromkeys(wanted)))
        self._is_streamed = not hasattr(dataset, "__len__")
        self._first_state: DatasetState | None = self._dataset.state_dict() if self._is_streamed else None
        self._state_at_start: DatasetState | None = None
        self._has_started = False

    @property
    def n_rows(self) -> int | None:
        """Number of rows; ``None`` where only reading to the end would tell."""
        return None if self._is_streamed else len(self._dataset)

    def rows(self, start: int = 0, state: DatasetState | None = None) -> Iterator[Row]:
        """Return the rows from ``start`` on. One iterator at a time: another call ends the one before.

        Args:
            start: rows to pass over.
            state: what :meth:`state` gave after ``start`` rows. With it a streamed dataset goes there at once;
                without it, it reads and drops what comes before.

        Raises:
            DataError: a row cannot be read.
        """
        self._state_at_start, self._has_started = state, False
        dataset = self._dataset
        first = 0 if self._is_streamed and state is None else start
        if self._is_streamed:
            dataset.load_state_dict(copy.deepcopy(self._first_state if state is None else state))
        elif start >= len(dataset):
            return iter(())  # the library cannot select nothing at the end
        else:
            dataset = dataset.select(range(start, len(dataset)))
        rows = enumerate(_guarded(self.spec, iter(dataset)), start=first)
        return (self._row(number, row) for number, row in rows if number >= start)

    def state(self) -> DatasetState | None:
        """Return where the iterator of :meth:`rows` stands; ``None`` where its number of rows is enough."""
        if not self._is_streamed or not self._has_started:
            return self._state_at_start
        state: DatasetState = self._dataset.state_dict()
        return state

    def _row(self, number: int, row: dict[str, object]) -> Row:
        self._has_started = True
        if self._whole_rows:
            return Row(number, None, None, row)
        domain_column = self._domain_column
        return Row(number, row[self.spec.text_column], None if domain_column is None else row[domain_column])

    def text_of(self, row: Row) -> str:
        """Return the text of a row.

        Raises:
            DataError: it is no text.
        """
        if not isinstance(row.text, str):
            found = "null" if row.text is None else f"of type {type(row.text).__name__}"
            raise DataError(
                f"the dataset {show(self.spec)}, row {row.number}: {self.spec.text_column!r} must be a text, but it is "
                f"{found}"
            )
        return row.text


def open_text_dataset(spec: DatasetConfig, *, streaming: bool, whole_rows: bool = False) -> TextDataset:
    """Open a dataset.

    Args:
        spec: what it is called and where its text is.
        streaming: read it as it comes over the network, or file by file, instead of downloading and converting it
            whole first. What ``save_to_disk`` wrote is read where it lies in either case.
        whole_rows: as :class:`TextDataset` takes it.

    Raises:
        DataError: there is no such dataset, configuration, split, file or column, or it cannot be reached.
    """
    import datasets  # noqa: PLC0415 - a second, which only its users pay

    folder = Path(spec.path).expanduser()
    if folder.is_dir() and any((folder / name).is_file() for name in _SAVED_BY_LIBRARY):
        return TextDataset(spec, _open_saved(spec, folder), whole_rows=whole_rows)
    if not folder.exists() and (folder.is_absolute() or spec.path.startswith((".", "~"))):
        raise DataError(f"the dataset {show(spec)} cannot be opened: there is no folder {folder}")
    if spec.path in _KINDS_OF_FILES and not spec.data_files:
        raise DataError(
            f"the dataset {show(spec)} names a kind of files but none of them; set data_files to a list of paths, or "
            "path to the folder that they are in"
        )
    try:
        dataset = datasets.load_dataset(
            str(folder) if folder.exists() else spec.path,
            spec.name,
            data_files=spec.data_files and [_expand(file) for file in spec.data_files],
            split=spec.split,
            revision=spec.revision,
            streaming=streaming,
        )
    except ConnectionError as error:
        raise DataError(
            f"the dataset {show(spec)} cannot be reached: {_one_line(error)}; check its name and the network, or give "
            "a local folder"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # The library's own sentences name the configurations, splits or files that there are.
        # Of a file that it cannot convert they say nothing, but what they were raised from does.
        cause = f" ({_one_line(error.__cause__)})" if error.__cause__ is not None else ""
        raise DataError(f"the dataset {show(spec)} cannot be opened: {_one_line(error)}{cause}") from error
    return TextDataset(spec, dataset, whole_rows=whole_rows)


def show(spec: DatasetConfig) -> str:
    """Return what a dataset is called in messages."""
    return "/".join(part for part in (spec.path, spec.name, spec.split) if part is not None)


def _open_saved(spec: DatasetConfig, folder: Path) -> Any:
    """Open what ``save_to_disk`` wrote: one split, or several by name."""
    import datasets  # noqa: PLC0415

    unused = [
        name for name in ("name", "data_files", "revision") if getattr(spec, name) is not None
    ]  # what was saved is one thing
    if unused:
        raise DataError(
            f"the dataset {show(spec)} was written by save_to_disk, where {unused[0]} has no meaning; leave it out"
        )
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the dataset {show(spec)} cannot be opened: {_one_line(error)}") from error
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if spec.split not in splits:
        raise DataError(
            f"the dataset {show(spec)} has no split {spec.split!r}; it has {', '.join(map(repr, splits))}"
        )
    return splits[spec.split]


def _guarded(spec: DatasetConfig, rows: Iterator[Any]) -> Iterator[Any]:
    """Iterate over rows; what the library and pyarrow raise on the way becomes one sentence."""
    import datasets  # noqa: PLC0415

    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"the dataset {show(spec)} cannot be read on from the {number:,} rows read so far: {_one_line(error)}"
            ) from error
        number += 1
        yield row


def _expand(file: str) -> str:
    """Resolve ``~``; other names stay as they are, since they may be addresses or patterns."""
    return str(Path(file).expanduser()) if file.startswith("~") else file


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
