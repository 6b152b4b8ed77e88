"""Cheap marks of inputs, by which unfinished work recognizes those that it was begun with."""

import hashlib
import os

from rwkv_train.data.sources.base import Source, cannot_read


def mark_of(source: Source) -> str:
    """Return a mark that changes when an input is written again: size and time of its files.

    Raises:
        DataError: a file is gone.
    """
    facts = hashlib.blake2b(digest_size=8)
    n_bytes = 0
    files = source.files()
    for file in files:
        try:
            told = file.stat()
        except OSError as error:
            raise cannot_read(file, error) from error
        facts.update(os.fsencode(file) + b"\0%d %d\0" % (told.st_size, told.st_mtime_ns))
        n_bytes += told.st_size
    return f"{n_bytes} bytes in {len(files)} files, {facts.hexdigest()}"
