"""A lock for builders that may be killed, and may run on several nodes that share one folder.

Locks of the operating system are not kept on every shared disk, and say nothing about who holds them. So the lock
is a file with its holder's name, made by one atomic call, and touched every few seconds while its holder lives. A
lock is stale, and is taken over, when its holder is a process of this machine that has ended, or when nobody has
touched it for a while.

Errors fall to the safe side: a holder that is wrongly taken for dead goes on building, a second builder does the
same work, and each puts a whole library into place. So nobody waits for ever, and no mistake here breaks a build.
"""

import errno
import functools
import json
import logging
import os
import platform
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 30.0
"""Without a touch for so long, a lock's holder is dead: longer than a shared disk or a busy machine may stall."""
PATIENCE_SECONDS = 900.0
"""After so long we build what another one still builds: it may hang."""
_REPORT_SECONDS = 15.0
_FIRST_REPORT_SECONDS = 3.0
_JUST_REMOVED = (errno.ENOENT, errno.ESTALE)
"""What reading a lock gives that was just removed; the latter on a shared disk, which may contradict itself too."""


class Holder(NamedTuple):
    """Who holds a lock."""

    host: str
    numbering: str
    """Where ``pid`` is the number of a process: this start of this machine, and within it this container."""
    pid: int
    started: str
    """When the process began, as this machine counts it: a process number is given again after its process ended."""
    token: str
    """Tells this holder's lock from any other one."""

    @classmethod
    def this_process(cls) -> "Holder":
        """Return a new holder of this process."""
        pid = os.getpid()
        return cls(platform.node(), _numbering(), pid, _start_of_process(pid) or "", uuid.uuid4().hex)

    @classmethod
    def read(cls, lock: Path) -> "Holder | None":
        """Return who holds a lock; ``None`` if that is not (or not yet) written there.

        Raises:
            FileNotFoundError: nobody holds it.
        """
        with suppress(ValueError, TypeError, KeyError):
            entries = json.loads(lock.read_text(encoding="utf-8"))
            return cls(*(entries[name] for name in cls._fields))
        return None

    def has_ended(self) -> bool:
        """Tell whether it is a process of this machine that runs no more; of others nothing is known."""
        is_here = (self.host, self.numbering) == (platform.node(), _numbering())
        return is_here and _start_of_process(self.pid) != self.started

    def work_folder(self, lock: Path) -> Path:
        """Return the folder beside a lock in which this holder works."""
        return lock.with_name(f"{lock.stem}-{self.token[:8]}.tmp")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class BuildCancelledError(Exception):
    """Whoever wanted a library wants it no more."""


def raise_if_cancelled(cancel: threading.Event | None) -> None:
    """Raise BuildCancelledError once ``cancel`` is set."""
    if cancel is not None and cancel.is_set():
        raise BuildCancelledError


@contextmanager
def hold_lock(
    lock: Path,
    what: str,
    is_done: Callable[[], bool],
    *,
    stale_seconds: float = STALE_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
    cancel: threading.Event | None = None,
) -> Iterator[Path | None]:
    """Hold a lock while the block runs; wait until it is free, stale, or not needed any more.

    Args:
        lock: the file that is the lock, in a folder that is there.
        what: what is built, for messages.
        is_done: whether what the lock is for has been done meanwhile.
        stale_seconds: age from which on a lock that nobody touches is taken over.
        patience_seconds: how long to wait for a holder that lives.
        cancel: ends the waiting when it is set.

    Yields:
        An empty folder beside the lock to work in, which goes with it; ``None`` if there is nothing left to do.

    Raises:
        OSError: the folder cannot be written.
        BuildCancelledError: ``cancel`` was set while we waited.
    """
    holder = Holder.this_process()
    is_ours = _wait(lock, holder, what, is_done, stale_seconds, patience_seconds, cancel)
    folder = holder.work_folder(lock)
    ended = threading.Event()
    try:
        if is_done():  # asked last: a shared disk may show a new file only after we wrote to its folder
            yield None
            return
        if is_ours:
            threading.Thread(target=_touch, args=(lock, holder, ended), daemon=True).start()
        folder.mkdir()
        yield folder
    finally:
        ended.set()
        shutil.rmtree(folder, ignore_errors=True)
        if is_ours:
            _release(lock, holder)


def _wait(
    lock: Path,
    holder: Holder,
    what: str,
    is_done: Callable[[], bool],
    stale_seconds: float,
    patience_seconds: float,
    cancel: threading.Event | None,
) -> bool:
    """Return whether we hold the lock; if not, the work is done or our patience is over."""
    began = time.monotonic()
    next_report = _FIRST_REPORT_SECONDS
    raise_if_cancelled(cancel)  # before the lock is taken: what is cancelled begins nothing
    while not _try_to_take(lock, holder):
        if is_done():
            return False
        waited = time.monotonic() - began
        try:
            other, age = Holder.read(lock), _age_seconds(lock)
        except OSError as error:
            if error.errno not in _JUST_REMOVED:
                raise
            other, age = None, 0.0
        who = other or "a process that left no name"
        if other is not None and other.has_ended():
            logger.warning("%s was to make %s and has ended; taking over", who, what)
            _remove(lock)
            shutil.rmtree(other.work_folder(lock), ignore_errors=True)
            continue
        if age > stale_seconds:
            logger.warning(
                "%s was to make %s and gave no sign of life for %.0f s; taking over", who, what, age
            )
            _remove(lock)
            continue
        if waited > patience_seconds:
            logger.warning(
                "%s has been making %s for more than %.0f s; making it here too", who, what, waited
            )
            return False
        if waited > next_report:
            logger.warning("waiting for %s to make %s (%.0f s; lock %s)", who, what, waited, lock)
            next_report = waited + _REPORT_SECONDS
        # Not in step with others that wait: two that find the same stale lock might remove each other's new one.
        pause = random.uniform(0.1, 0.3) if waited < 10 else random.uniform(0.5, 1.5)
        if cancel is None:
            time.sleep(pause)
        else:
            cancel.wait(pause)
            raise_if_cancelled(cancel)
    return True


def _try_to_take(lock: Path, holder: Holder) -> bool:
    try:
        # O_EXCL is atomic between nodes too. The folder is asked itself each time, past any cache of its entries.
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor has no path
            json.dump(holder._asdict(), file)
    except OSError:  # a full disk may hold an empty file and no letter more
        lock.unlink(missing_ok=True)
        raise
    return True


def _age_seconds(lock: Path) -> float:
    """Return how long ago a lock was touched, by the clock of its disk: those of two nodes may differ."""
    with tempfile.TemporaryFile(dir=lock.parent) as now, lock.open("rb") as touched:
        # Opened, not only looked at: that asks the server of a shared disk anew.
        return os.fstat(now.fileno()).st_mtime - os.fstat(touched.fileno()).st_mtime


def _touch(lock: Path, holder: Holder, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            if Holder.read(lock) != holder:
                return
            os.utime(lock)


def _release(lock: Path, holder: Holder) -> None:
    with suppress(OSError):
        if Holder.read(lock) == holder:  # it may have been taken over
            lock.unlink()


def _remove(lock: Path) -> None:
    """Remove a stale lock; renamed first, so that of several that try one succeeds."""
    grave = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        lock.rename(grave)
    except FileNotFoundError:
        return
    grave.unlink(missing_ok=True)


@functools.cache
def _numbering() -> str:
    boot, container = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text().strip()} {container.readlink()}"
    except OSError:
        return ""  # no Linux


def _start_of_process(pid: int) -> str | None:
    """Return when a process began, in a form that can be compared; ``None`` if it has ended."""
    try:
        # The 22nd field; the second one, the program's name in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _is_running(pid)
    return None if fields[0] == "Z" else fields[19]


def _is_running(pid: int) -> str | None:
    """Tell the same where there is no /proc: then a new process of the same number is taken for the old one."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except OSError as error:
        return "" if error.errno == errno.EPERM else None
    return ""
