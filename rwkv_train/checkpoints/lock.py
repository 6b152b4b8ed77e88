"""One process at a time works on the folder of a run: the run itself, or what removes checkpoints from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rwkv_train.errors import ConfigError

LOCK_FILE = ".lock"
"""Name of the file in ``out_dir`` that is locked; it stays, and only its lock counts."""


@contextmanager
def hold_run_folder(out_dir: Path) -> Iterator[None]:
    """Keep other processes from working on a run's folder while the block runs.

    The lock ends with the process, however that ends. In a run of several processes one of them holds it.

    Args:
        out_dir: folder of the run; it is there.

    Raises:
        ConfigError: another process holds it.
    """
    lock = FileLock(out_dir / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"trainer.out_dir ({out_dir}) is in use by another run; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
