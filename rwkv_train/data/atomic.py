"""Files that appear whole and together, or not at all."""

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from rwkv_train.errors import DataError


class AtomicFiles:
    """Write files under temporary names beside their own; rename them when all are complete.

    Left by an exception, it removes what it wrote. The *last* path is the mark of a complete set: it appears
    last, and where files are replaced it disappears first, so a killed process leaves no mixture that looks
    complete::

        with AtomicFiles([data, index]) as files:
            files[data].write(...)
            files[index].write(...)

    Args:
        paths: the files, in one folder, which is made if needed.
        overwrite: replace files that exist, instead of refusing.

    Raises:
        DataError: a file exists, the folder cannot be written, or the disk is full.
    """

    def __init__(self, paths: Sequence[Path], *, overwrite: bool = False) -> None:
        self._paths = list(paths)
        self._overwrite = overwrite
        self._open: dict[Path, BinaryIO] = {}
        self._temporary: dict[Path, Path] = {}

    def __getitem__(self, path: Path) -> BinaryIO:
        return self._open[path]

    def __enter__(self) -> Self:
        self._refuse_existing()
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            for path in self._paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.{token}.tmp")
                self._temporary[path] = temporary
                self._open[path] = temporary.open("x+b")
        except OSError as error:
            self._discard()
            raise self._cannot_write(error) from error
        except BaseException:  # a signal: __exit__ is not called yet
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._discard()
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            return
        try:
            self._commit()
        except OSError as problem:
            raise self._cannot_write(problem) from problem
        finally:
            self._discard()

    def _commit(self) -> None:
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._refuse_existing()  # another process may have been faster
        self._paths[-1].unlink(missing_ok=True)
        for path in self._paths:
            self._temporary[path].replace(path)
        folder = os.open(self._paths[-1].parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renames themselves
        finally:
            os.close(folder)

    def _discard(self) -> None:
        for file in self._open.values():
            with suppress(OSError):  # a full disk refuses the last buffer, which is not wanted any more
                file.close()
        for temporary in self._temporary.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self._overwrite:
            return
        for path in self._paths:
            if path.exists():
                raise DataError(f"{path} exists already; choose another output or ask for overwriting")

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(f"cannot write {self._paths[-1]}: {error.strerror or error}")
