"""A small disk of a trial's own: a tmpfs in a mount namespace, which needs no rights of an administrator."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_MOUNT = 'mount -t tmpfs -o "size=$2" tmpfs "$1" && echo ready && exec sleep 1000000'


def can_mount() -> bool:
    """Tell whether this machine lets us have such a disk."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class SmallDisk:
    """A tmpfs over a folder, seen by the processes that are started with ``prefix``.

    Args:
        folder: where it is mounted; it is made.
        megabytes: its size.
    """

    def __init__(self, folder: Path, megabytes: float) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        namespace = ["unshare", "--map-root-user", "--mount"]
        mount = ["sh", "-c", _MOUNT, "sh", str(folder), str(int(megabytes * 1e6))]
        self._holder = subprocess.Popen([*namespace, *mount], stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError("the tmpfs could not be mounted")
        self.prefix = ["nsenter", f"--target={self._holder.pid}", "--user", "--mount"]
        self.prefix += ["--preserve-credentials", "--"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.communicate()

    def seen_from_here(self, path: Path) -> Path:
        """Return how this process, outside the namespace, reaches a path on the disk."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def fill(self, spare_bytes: int = 0) -> None:
        """Take all space but so many bytes, at once."""
        filler = self.seen_from_here(self.folder / "filler")
        with filler.open("ab") as file:
            # Others write meanwhile, and a request for more than there is gets nothing.
            while (free := shutil.disk_usage(filler.parent).free) > spare_bytes:
                with suppress(OSError):
                    size = file.seek(0, os.SEEK_END)
                    os.posix_fallocate(file.fileno(), size, max(1, (free - spare_bytes) // 2))

    def empty(self) -> None:
        """Give that space back."""
        self.seen_from_here(self.folder / "filler").unlink()

    def remount(self, options: str) -> None:
        """Change how it is mounted: ``"ro"``, ``"rw"``."""
        command = [*self.prefix, "mount", "-o", f"remount,{options}", str(self.folder)]
        for _ in range(50):  # a process that was just killed may hold a file for a moment
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.folder} could not be remounted with {options}")
