"""Files and folders that are there whole or not at all.

What is written gets a temporary name beside its target (so on the same disk), is flushed to the disk, and
only then takes its name. A process killed at any moment leaves what was there before, and at most one entry
whose name starts with ``NEW_PREFIX`` or ``OLD_PREFIX``; the next write to the same target clears it away.
One process at a time may write one target; targets beside each other do not disturb each other.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rwkv_train.errors import CheckpointError

NEW_PREFIX = ".rwkv-train-new-"
"""Begins the name of what is being written; 8 random hex digits, a hyphen and the target's name follow."""

OLD_PREFIX = ".rwkv-train-old-"
"""Begins the name of a folder that is being replaced or removed; the target's name follows."""

SPARE_BYTES = 1 << 20
"""Room asked for besides the tensors, for names and JSON, in bytes."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def os_errors_as_sentences(path: Path, action: str) -> Iterator[None]:
    """Turn what the operating system refuses into a :class:`CheckpointError` about ``path``.

    Args:
        path: what the sentence is about.
        action: the verb of the sentence, such as ``"written"``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        culprit = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise CheckpointError(f"{path} cannot be {action}: {reason}{culprit}") from error


def resolve_target(path: str | Path) -> Path:
    """Return where a write to ``path`` goes: symbolic links are followed, never replaced.

    Raises:
        CheckpointError: the path has no end (a loop of links), or begins in the home of nobody.
    """
    path = Path(path)
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be written: there is no such home folder") from error
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: its symbolic links form a loop") from error


@contextmanager
def new_file(path: Path, n_bytes: int) -> Iterator[Path]:
    """Hand out a temporary path that becomes the file ``path`` when the block ends without an error.

    Args:
        path: the target; a file that is there is replaced at the last moment. Its folder is made.
        n_bytes: size that the file will have, roughly.

    Raises:
        CheckpointError: the disk is too full, or the operating system refuses; nothing has changed then.
    """
    with os_errors_as_sentences(path, "written"):
        _prepare(path, n_bytes)
        temporary = _temporary_name(path)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush(path.parent)


@contextmanager
def new_folder(folder: Path, n_bytes: int) -> Iterator[Path]:
    """Hand out a temporary folder that becomes ``folder`` when the block ends without an error.

    A folder that is there is replaced. That takes two renames: a process killed between them leaves the old
    folder under ``OLD_PREFIX`` and its name, from where the next write puts it back.

    Args:
        folder: the target. The folder above it is made.
        n_bytes: size of all its files, roughly.

    Raises:
        CheckpointError: the disk is too full, or the operating system refuses; nothing has changed then.
    """
    with os_errors_as_sentences(folder, "written"):
        _prepare(folder, n_bytes)
        temporary = _temporary_name(folder)
        try:
            temporary.mkdir()
            yield temporary
            for entry in temporary.iterdir():
                _flush(entry)
            _flush(temporary)
            _take_name(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush(folder.parent)
        shutil.rmtree(_set_aside_name(folder), ignore_errors=True)


def require_space(path: str | Path, n_bytes: int) -> None:
    """Refuse to start what the disk has no room for.

    Args:
        path: where it would be written; it need not be there yet.
        n_bytes: size that it will have, roughly.

    Raises:
        CheckpointError: the disk is too full (it says how much is needed and free), or cannot be asked.
    """
    path = Path(path).expanduser()
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)
    with os_errors_as_sentences(path, "written"):
        free_bytes = shutil.disk_usage(there).free
    if free_bytes < n_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{path} cannot be written: it needs {(n_bytes + SPARE_BYTES) / 1e6:,.0f} MB and its disk has "
            f"{free_bytes / 1e6:,.0f} MB free; free some space or choose another disk"
        )


def require_writable(path: Path) -> None:
    """Refuse a target in whose folder nothing can be made, or that lies under a file.

    Args:
        path: the target; neither it nor its folder need be there yet.

    Raises:
        CheckpointError: the operating system would refuse to write there.
    """
    with os_errors_as_sentences(path, "written"):
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it is never seen half deleted under its own name.

    Raises:
        CheckpointError: the operating system refuses.
    """
    with os_errors_as_sentences(folder, "removed"):
        if folder.is_symlink():
            folder.unlink()
            return
        doomed = _temporary_name(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(parent: Path, is_target: Callable[[str], bool]) -> None:
    """Clear away what killed writes left in ``parent``; a folder lost between two renames is put back.

    Args:
        parent: the folder to look through.
        is_target: tells from a target's name whether its leftovers are meant.
    """
    for entry in list(parent.iterdir()):
        if (new := _NEW_NAME.fullmatch(entry.name)) and is_target(new["target"]):
            _delete(entry)
        elif entry.name.startswith(OLD_PREFIX) and is_target(entry.name.removeprefix(OLD_PREFIX)):
            target = entry.with_name(entry.name.removeprefix(OLD_PREFIX))
            if target.exists():
                _delete(entry)
            else:
                entry.rename(target)


_NEW_NAME = re.compile(re.escape(NEW_PREFIX) + r"[0-9a-f]{8}-(?P<target>.+)", re.DOTALL)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f"{NEW_PREFIX}{secrets.token_hex(4)}-{target.name}")


def _set_aside_name(folder: Path) -> Path:
    return folder.with_name(OLD_PREFIX + folder.name)


def _prepare(target: Path, n_bytes: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, lambda name: name == target.name)
    require_space(target, n_bytes)


def _take_name(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    set_aside = _set_aside_name(folder)
    folder.rename(set_aside)
    try:
        temporary.rename(folder)
    except BaseException:
        set_aside.rename(folder)
        raise


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
