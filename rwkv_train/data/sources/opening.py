"""Find out what an input is, and open it."""

from pathlib import Path

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.sources.base import Source, SourceOptions, cannot_read
from rwkv_train.data.sources.folder import FolderSource
from rwkv_train.data.sources.formats import PAIR, format_of
from rwkv_train.data.sources.hub import HUB_PREFIX, HubSource
from rwkv_train.data.sources.pair import PairSource


def open_source(name: str, options: SourceOptions | None = None) -> Source:
    """Open text to be read.

    Args:
        name: path of a file, whose ending says its format; of a folder of such files; of a ``.bin/.idx`` pair (its
            prefix or one of the two); or ``hf:`` and the name or folder of a dataset.
        options: how it is read.

    Raises:
        DataError: it is missing, empty or of an unknown kind; the message says what would be right.
    """
    options = options or SourceOptions()
    if name.startswith(HUB_PREFIX):
        return HubSource(name.removeprefix(HUB_PREFIX), options)
    try:
        path = Path(name).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
        is_pair = path.suffix in (".bin", ".idx") or (not is_there and add_suffix(path, ".idx").exists())
    except (OSError, RuntimeError) as error:  # a name that is too long or forbidden, the home of nobody
        raise cannot_read(Path(name), error) from error
    if options.format == PAIR or (options.format is None and is_pair):
        return PairSource(path, options)
    if is_folder:
        return FolderSource(path, options)
    return format_of(path, options.format).open(path, options)
