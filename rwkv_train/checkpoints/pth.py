"""The published format of weights: a dictionary of tensors, written by ``torch.save`` (``.pth``).

Such a file is a pickle, which can hold any program. So it is read with ``weights_only=True`` alone: PyTorch
then builds tensors and refuses everything else before it runs. Damage is found by the checksums that a zip
file carries.
"""

import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.tensors import with_own_memory
from rwkv_train.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
"""First bytes of what torch.save writes since 2020."""

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""First bytes of what torch.save wrote before: a number, pickled by protocol 2."""

_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, ArithmeticError, RuntimeError)
"""What the standard library raises for a zip file that is damaged."""


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pth`` file, with the names they have in it.

    Returns:
        Tensors; those of a zip file are mapped from the disk: copy before you change them.

    Raises:
        CheckpointError: the file is damaged, or holds more than a dictionary of tensors.
    """
    return named_tensors(path, read_pickle(path))


def read_pickle(path: Path, stand_ins: Mapping[str, Callable[..., object]] | None = None) -> object:
    """Read what ``torch.save`` wrote: dictionaries, lists, strings, numbers and tensors, of any nesting.

    Args:
        path: the file.
        stand_ins: further names that it may ask for -> what is called in their place. No other name is looked
            up, let alone imported, whatever this process has allowed PyTorch elsewhere.

    Returns:
        The content; tensors of a zip file are mapped from the disk: copy before you change them.

    Raises:
        CheckpointError: the file is damaged, or asks for a name that is not allowed.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if is_zip:
        _check_records(path)
    try:
        with _allowing_only(stand_ins or {}):
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # bytes that someone made up can raise anything
        raise CheckpointError(f"{path} cannot be read as a file of torch.save: {_reason(error)}") from error
    return content


def named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """Return ``content``, which was read from ``path``, having checked that it is names and tensors alone.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}; a file of weights holds only named "
                "tensors"
            )
    return {name: value.detach() for name, value in content.items()}


def mentions(path: Path, text: str) -> bool:
    """Tell whether a zip file of ``torch.save`` holds a string, without unpickling anything.

    Args:
        path: the file.
        text: the whole string, such as the key of a dictionary.

    Returns:
        False too where the file is damaged: who reads it will say so.
    """
    encoded = text.encode()
    pickled = b"X" + len(encoded).to_bytes(4, "little") + encoded  # as protocol 2 writes a string
    try:
        with zipfile.ZipFile(path) as archive:
            records = [r for r in archive.infolist() if r.filename.endswith("/data.pkl")]
            return any(r.compress_type == zipfile.ZIP_STORED and pickled in archive.read(r) for r in records)
    except _ZIP_ERRORS:
        return False


def save_pth(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to ``path`` as the published trainer does; use :func:`new_file` to do it safely.

    Raises:
        CheckpointError: PyTorch could not write the file.
    """
    content = with_own_memory(tensors)
    try:
        # Through an open file: given a path, torch.save writes the (temporary) name into every record.
        with path.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter when the disk is full
        raise CheckpointError(f"{path.parent}: the .pth file cannot be written: {_reason(error)}") from error


@contextmanager
def _allowing_only(stand_ins: Mapping[str, Callable[..., object]]) -> Iterator[None]:
    """Let PyTorch's careful unpickler know these names, for as long as the block runs, and none beside its own.

    Its list is one of the process, and a name that a library put there would be imported and called.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([(made, name) for name, made in stand_ins.items()])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _check_records(path: Path) -> None:
    """Refuse a zip file with a record that is damaged, or compressed: torch.save never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path} is not a file of torch.save: its record '{record.filename}' is compressed"
                    )
                if record.CRC == 0:
                    continue  # written without checksums, as torch.save can be told to
                with archive.open(record) as data:
                    while data.read(1 << 20):  # at the end, a checksum that differs raises
                        pass
    except CheckpointError:
        raise
    except Exception as error:  # as in read_pickle
        raise CheckpointError(f"{path} is truncated or damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of what PyTorch said; for a refused pickle our own words instead of its advice."""
    text = str(error).strip() or type(error).__name__
    if "Weights only load failed" in text:
        asked = re.search(r"GLOBAL (\S+)", text)
        what = f" ({asked[1]})" if asked else ""
        return f"it is damaged, or asks for more than tensors{what}, which is refused"
    line = text.splitlines()[0]
    return line if len(line) <= 200 else f"{line[:197]}..."
