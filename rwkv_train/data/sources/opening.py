"""Find out what an input is, and open it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.sources.base import Source, SourceOptions
from rwkv_train.data.sources.json_lines import JsonLinesSource
from rwkv_train.data.sources.text import TextSource
from rwkv_train.errors import DataError


class Format(NamedTuple):
    """A kind of file."""

    suffixes: tuple[str, ...]
    """Endings by which it is recognized."""
    open: Callable[[Path, SourceOptions], Source]


FORMATS = {
    "jsonl": Format((".jsonl", ".jsonl.zst", ".jsonl.gz"), JsonLinesSource),
    "text": Format((".txt", ".md"), TextSource),
}
"""The formats by the names that ``SourceOptions.format`` takes."""


def open_source(name: str, options: SourceOptions | None = None) -> Source:
    """Open text to be read.

    Args:
        name: path of a file whose ending says its format.
        options: how it is read.

    Raises:
        DataError: it is missing, empty or of an unknown kind; the message says what would be right.
    """
    options = options or SourceOptions()
    path = Path(name)
    return _format_of(path, options.format).open(path, options)


def _format_of(path: Path, name: str | None) -> Format:
    if name is not None:
        if name not in FORMATS:
            raise DataError(f"there is no format '{name}'; wanted {', '.join(FORMATS)}")
        return FORMATS[name]
    for known in FORMATS.values():
        if path.name.endswith(known.suffixes):
            return known
    endings = ", ".join(suffix for known in FORMATS.values() for suffix in known.suffixes)
    raise DataError(
        f"{path}: cannot tell the format; wanted a name that ends in {endings}, or the name of the format: "
        f"{', '.join(FORMATS)}"
    )
