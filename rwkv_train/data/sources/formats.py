"""The formats of files, and how a file's is found."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.sources.base import FileSource, SourceOptions, show_path
from rwkv_train.data.sources.delimited import DelimitedSource
from rwkv_train.data.sources.json_array import JsonArraySource
from rwkv_train.data.sources.json_lines import JsonLinesSource
from rwkv_train.data.sources.parquet import ParquetSource
from rwkv_train.data.sources.text import TextSource
from rwkv_train.errors import DataError


class Format(NamedTuple):
    """A kind of file."""

    suffixes: tuple[str, ...]
    """Endings by which it is recognized, in lower case; none: only by the format's name."""
    open: Callable[[Path, SourceOptions], FileSource]


FORMATS = {
    "jsonl": Format((".jsonl", ".jsonl.zst", ".jsonl.gz"), JsonLinesSource),
    "text": Format((".txt", ".md"), TextSource),
    "parquet": Format((".parquet",), ParquetSource),
    "csv": Format((".csv", ".tsv"), DelimitedSource),
    # Most .json files are no list of records, among them those beside a prepared corpus.
    "json": Format((), JsonArraySource),
}
"""By the names that ``SourceOptions.format`` takes."""

SUFFIXES = tuple(suffix for known in FORMATS.values() for suffix in known.suffixes)
"""All endings that are recognized."""

PAIR = "pair"
"""Name of the format that is two files, ``.bin`` and ``.idx``."""


def format_of(path: Path, name: str | None) -> Format:
    """Return a file's format.

    Args:
        path: the file; its ending counts if ``name`` is ``None``.
        name: one of ``FORMATS``.

    Raises:
        DataError: the ending is not known, or there is no format of this name.
    """
    if name is not None:
        if name not in FORMATS:
            raise DataError(f"there is no format '{name}'; wanted {', '.join([*FORMATS, PAIR])}")
        return FORMATS[name]
    for known in FORMATS.values():
        if path.name.lower().endswith(known.suffixes):
            return known
    raise DataError(
        f"{show_path(path)}: cannot tell the format; wanted a name that ends in {', '.join(SUFFIXES)}, or the name of "
        f"the format (--format; in data.datasets: file_format): {', '.join(FORMATS)}"
    )
