"""Files of results: found writable before the long work, and written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rwkv_train.errors import ConfigError

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")]


def require_writable(path: Path | None, option: str = "--json") -> None:
    """Find out before the long work, not after it.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written; give a file in a folder that can be")


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write JSON; nothing where no file is named."""
    if path is not None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # Python's escapes of what is not UTF-8 in the names of files are JSON's too.
        write_whole(path, text.encode(errors="backslashreplace"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or nothing; a device such as /dev/stdout is written to, not replaced."""
    from rwkv_train.checkpoints.io import new_file, os_errors_as_sentences, resolve_target

    if path.exists() and not path.is_file():
        with os_errors_as_sentences(path, "written"):
            path.write_bytes(content)
        return
    with new_file(resolve_target(path), len(content)) as new:
        new.write_bytes(content)
