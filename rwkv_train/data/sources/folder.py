"""All texts of a folder and of the folders in it, in the order of their paths."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from rwkv_train.data.sources.base import (
    COLUMN_OPTIONS,
    Block,
    NoDocumentsError,
    Source,
    SourceIdentity,
    SourceOptions,
    cannot_read,
    hash_file,
    show_path,
)
from rwkv_train.data.sources.formats import FORMATS, SUFFIXES, format_of
from rwkv_train.data.sources.hub import HUB_PREFIX
from rwkv_train.data.sources.rows import RowBlock
from rwkv_train.data.sources.text import TextFile, group_text_files
from rwkv_train.errors import DataError

logger = logging.getLogger(__name__)


class FolderSource(Source):
    """A folder whose files are read by their endings; other files and hidden ones are left out.

    A file without records is passed over and counted, as an empty text is. All files are opened at once, so that one
    without the column of the text is refused before anything is read.

    The domain of a text file is the name of its first folder below the given one, else the given one's.

    Args:
        path: the folder.
        options: how the files are read; with a format all files but hidden ones are of that format.

    Raises:
        DataError: it cannot be read, or holds nothing that can.
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.options = options
        self.name = show_path(path)
        self._files: list[tuple[Path, int]] = []  # below the folder, and the size
        left_out: Counter[str] = Counter()
        try:
            for file in sorted(_walk(path)):
                if not (path / file).is_file():  # a link to a folder or to nothing, a pipe, ...
                    left_out["not a file"] += 1
                elif options.format is None and not file.name.lower().endswith(SUFFIXES):
                    left_out[show_path(file.suffix) or "without ending"] += 1
                else:
                    self._files.append((file, (path / file).stat().st_size))
        except OSError as error:
            raise cannot_read(Path(error.filename or path), error) from error
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
        if not self._files:
            found = f"only files of other kinds ({kinds})" if kinds else "no files"
            raise DataError(
                f"the folder {self.name} holds {found}; wanted files that end in {', '.join(SUFFIXES)}, or "
                f"{HUB_PREFIX} before the name of a dataset's folder"
            )
        if kinds:
            logger.warning("%s: left out what is of other kinds: %s", self.name, kinds)
        has_columns = not all(self._is_text(file) for file, _ in self._files)
        self.uses = frozenset({"format"}) | (COLUMN_OPTIONS if has_columns else frozenset())
        self.n_bytes = sum(n_bytes for _, n_bytes in self._files)
        self._n_without_records = 0
        for file, _ in self._files:
            if not self._is_text(file):
                with suppress(NoDocumentsError):
                    self._open(file)

    def describe(self) -> SourceIdentity:
        """Return path, size of all files, and the hash of a list of their hashes and paths as sha256sum prints it.

        The number of files without records is that of the last reading.
        """
        listed = hashlib.sha256()
        for file, _ in self._files:
            listed.update(
                f"{hash_file(self.path / file)}  {file.as_posix()}\n".encode(errors="surrogateescape")
            )
        assert self.n_bytes is not None
        return SourceIdentity(self.name, self.n_bytes, listed.hexdigest(), self._n_without_records)

    def files(self) -> Sequence[Path]:
        """Return those that are read."""
        return [self.path / file for file, _ in self._files]

    def _cut(self) -> Iterator[Block]:
        without_records: list[Path] = []
        for is_text, files in groupby(self._files, key=lambda entry: self._is_text(entry[0])):
            if is_text:
                yield from group_text_files(
                    TextFile(self.path / file, self._domain(file), n_bytes) for file, n_bytes in files
                )
                continue
            for file, n_bytes in files:
                n_left = n_bytes
                try:
                    for block in self._open(file).blocks():
                        n_left -= block.n_bytes
                        yield block
                except NoDocumentsError:
                    without_records.append(file)
                    yield RowBlock(show_path(self.path / file), (), self.options, n_left)
        self._n_without_records = len(without_records)
        if len(without_records) == len(self._files):
            raise NoDocumentsError(f"the folder {self.name} holds no documents: no file has records")
        if without_records:
            logger.warning(
                "%s: passed over files without records: %d, the first is %s",
                self.name,
                len(without_records),
                show_path(without_records[0]),
            )

    def _open(self, file: Path) -> Source:
        return format_of(file, self.options.format).open(self.path / file, self.options)

    def _is_text(self, file: Path) -> bool:
        return format_of(file, self.options.format) is FORMATS["text"]

    def _domain(self, file: Path) -> str:
        return show_path(file.parts[0] if len(file.parts) > 1 else self.path.resolve().name)


def _walk(root: Path) -> Iterator[Path]:
    """Yield what is not hidden and no folder, relative to ``root``; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        yield from (below / name for name in [*names, *links] if not name.startswith("."))
