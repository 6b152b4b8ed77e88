"""The published format of weights: a dictionary of tensors, written by ``torch.save`` (``.pth``).

Such a file is a pickle, which can hold any program. So it is read with ``weights_only=True`` alone: PyTorch
then builds tensors and refuses everything else before it runs. Damage is found by the checksums that a zip
file carries.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import as_bytes
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
        with _allowing_only(stand_ins or {}), path.open("rb") as file:
            # A zip file is mapped, for which PyTorch wants its path; but it goes by the name of one that ends so.
            is_mapped = is_zip and path.suffix != ".safetensors"
            content: object = torch.load(
                path if is_mapped else file, map_location="cpu", weights_only=True, mmap=is_mapped
            )
            if not is_zip and file.read(1):  # without checksums, length is all there is to compare
                raise ValueError("there is something after its end")
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
    """Write tensors to ``path`` as ``torch.save`` does, but one at a time; use :func:`new_file` to do it safely.

    Raises:
        OSError: the operating system refuses.
    """
    keys = {name: str(number) for number, name in enumerate(tensors)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", _pickled_table(TensorSource.of(tensors).headers, keys))
        _write_record(archive, "byteorder", b"little")
        for name, tensor in tensors.items():
            _write_record(archive, f"data/{keys[name]}", as_bytes(tensor))
        _write_record(archive, "version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Append a record whose content starts at a multiple of 64 bytes, as PyTorch's writer aligns it."""
    n_bytes = memoryview(content).nbytes
    record = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    record.file_size, record.CRC = n_bytes, 0  # the checksum is counted, and put there, while it is written
    is_large = n_bytes >= zipfile.ZIP64_LIMIT
    assert archive.fp is not None
    start = archive.fp.tell() + len(record.FileHeader(zip64=is_large)) + _EXTRA_FIELD.size
    padding = -start % _ALIGNMENT
    record.extra = _EXTRA_FIELD.pack(b"FB", padding) + b"Z" * padding
    with archive.open(record, "w", force_zip64=is_large) as file:
        file.write(content)


_ALIGNMENT = 64
_EXTRA_FIELD = struct.Struct("<2sH")
"""Kind and length of what stands between a record's name and its content; PyTorch calls its padding FB."""


class _Values(NamedTuple):
    """Stands for a tensor's values in the pickle, which lie in a record of their own."""

    key: str
    header: Tensor


class _Entry(NamedTuple):
    """Stands for a tensor in the pickle."""

    values: _Values


class _TablePickler(pickle.Pickler):
    """Writes names, shapes and dtypes as ``torch.save`` does, for tensors that are not there yet."""

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, _Values):
            return None
        return "storage", _STORAGES[obj.header.dtype], obj.key, "cpu", obj.header.numel()

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, _Entry):
            return NotImplemented
        header = obj.values.header
        start = 0
        return torch._utils._rebuild_tensor_v2, (
            obj.values,
            start,
            tuple(header.shape),
            header.stride(),
            False,
            OrderedDict(),
        )


_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}
"""What a pickle of ``torch.save`` names a dtype by."""


def _pickled_table(headers: Mapping[str, Tensor], keys: Mapping[str, str]) -> bytes:
    table = io.BytesIO()
    entries = {name: _Entry(_Values(keys[name], header)) for name, header in headers.items()}
    _TablePickler(table, protocol=2).dump(entries)
    return table.getvalue()


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
