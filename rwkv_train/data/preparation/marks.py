"""Cheap marks of inputs, by which unfinished work recognizes those that it was begun with."""

import hashlib
import os
from pathlib import Path

from rwkv_train.data.binidx import add_suffix

_PAIR_SUFFIXES = ("", ".bin", ".idx", ".json")


def mark_of(name: str) -> str:
    """Return a mark that changes when an input is written again: size and time of its files.

    A dataset of the hub has none: it is taken for the same by its name.
    """
    path = Path(name.removeprefix("hf:")).expanduser()
    files = (
        [file for suffix in _PAIR_SUFFIXES if (file := add_suffix(path, suffix)).is_file()]
        if path.name
        else []
    )
    if path.suffix in _PAIR_SUFFIXES[1:]:
        files += [file for suffix in _PAIR_SUFFIXES[1:] if (file := path.with_suffix(suffix)).is_file()]
    if path.is_dir():
        files += sorted(file for file in path.rglob("*") if file.is_file())
    facts = hashlib.blake2b(digest_size=8)
    n_bytes = 0
    for file in files:
        told = file.stat()
        facts.update(os.fsencode(file) + b"\0%d %d\0" % (told.st_size, told.st_mtime_ns))
        n_bytes += told.st_size
    return f"{n_bytes} bytes in {len(files)} files, {facts.hexdigest()}"
