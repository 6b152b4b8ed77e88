"""The published format of weights: a dictionary of tensors, written by ``torch.save`` (``.pth``).

Such a file is a pickle, which can hold any program. So it is read with ``weights_only=True`` alone: PyTorch
then builds tensors and refuses everything else before it runs. Damage is found by the checksums that a zip
file carries.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.tensors import with_own_memory
from rwkv_train.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
"""First bytes of what torch.save writes since 2020."""

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""First bytes of what torch.save wrote before: a number, pickled by protocol 2."""


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pth`` file, with the names they have in it.

    Returns:
        Tensors; those of a zip file are mapped from the disk: copy before you change them.

    Raises:
        CheckpointError: the file is damaged, or holds more than a dictionary of tensors.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip:
        _check_records(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # bytes that someone made up can raise anything
        raise CheckpointError(f"{path} cannot be read as a .pth file: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}; a file of weights holds only named "
                "tensors"
            )
    return {name: value.detach() for name, value in content.items()}


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


def _check_records(path: Path) -> None:
    """Refuse a zip file with a record that is damaged, or compressed: torch.save never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path} is not a .pth file: its record '{record.filename}' is compressed"
                    )
                if record.CRC == 0:
                    continue  # written without checksums, as torch.save can be told to
                with archive.open(record) as data:
                    while data.read(1 << 20):  # at the end, a checksum that differs raises
                        pass
    except CheckpointError:
        raise
    except Exception as error:  # as in read_pth
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
