"""Find out what an input is, and open it."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.sources.base import Source, SourceOptions, cannot_read, show_path
from rwkv_train.data.sources.folder import FolderSource
from rwkv_train.data.sources.formats import PAIR, format_of
from rwkv_train.data.sources.hub import HUB_PREFIX, HubSource
from rwkv_train.data.sources.pair import PairSource
from rwkv_train.errors import ConfigError, DataError

_COMMAND_OPTIONS = {"dataset_streaming": "--streaming"}  # of another name than the field


def open_sources(names: Sequence[str | Path], options: SourceOptions | None = None) -> list[Source]:
    """Open several inputs, so that what is wrong with the last is known before the first is read.

    Raises:
        DataError: as :func:`open_source`.
        ConfigError: an option changes nothing for any of them.
    """
    options = options or SourceOptions()
    sources = [open_source(str(name), options) for name in names]
    defaults = SourceOptions()
    for field, value in options._asdict().items():
        if value != getattr(defaults, field) and not any(field in source.uses for source in sources):
            option = _COMMAND_OPTIONS.get(field, "--" + field.replace("_", "-"))
            raise ConfigError(f"{option} changes nothing for {', '.join(map(str, names))}; leave it out")
    return sources


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
    if not name:
        raise DataError("an input has an empty name; wanted a file, a folder, a pair or hf:NAME")
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
    if not is_there:
        raise DataError(
            f"cannot read {show_path(path)}: No such file or directory; wanted a file, a folder, the prefix of a "
            ".bin/.idx pair, or hf:NAME"
        )
    return format_of(path, options.format).open(path, options)
