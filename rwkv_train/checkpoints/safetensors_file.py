"""Tensors in one ``.safetensors`` file: a JSON table of names, dtypes, shapes and places, then the values.

The format cannot hold a program. It has no checksum either: a flipped bit in a value shows only where a
SHA-256 was written beside the file, as our folders and training checkpoints do.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from rwkv_train.checkpoints.tensors import with_own_memory
from rwkv_train.errors import CheckpointError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Returns:
        Tensors on the CPU, mapped from the disk: copy before you change them.

    Raises:
        CheckpointError: the file is damaged or not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    except Exception as error:  # bytes that someone made up can raise anything
        raise CheckpointError(f"{path} is truncated or damaged: {' '.join(str(error).split())}") from error


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to ``path``; use :func:`new_file` or :func:`new_folder` to do it safely.

    Raises:
        CheckpointError: the file could not be written.
    """
    content = with_own_memory(tensors)
    try:
        # "format" is what other readers of such files ask for.
        save_file(content, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # also where the disk is full
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path.parent}: {path.name} cannot be written: {reason}") from error


class SafetensorsWriter:
    """Writes float32 tensors to one file as they come, and holds none of them.

    A file starts with the table of what follows, which is known only at the end. So room for it is left, and
    filled when the ``with`` block ends; blanks after a table belong to the format.

    Args:
        path: the file; use :func:`new_file` or :func:`new_folder` to write it safely.
        table_bytes: room for the table, as :func:`table_size` counts it.
    """

    def __init__(self, path: Path, table_bytes: int) -> None:
        self.n_bytes = 0
        """Size of the tensors so far."""
        self._table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._table_bytes = table_bytes + -table_bytes % 8  # the values of a tensor start at a multiple of 8
        self._file = path.open("wb")
        self._file.seek(8 + self._table_bytes)

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous float32 tensor on the CPU."""
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        values: npt.NDArray[np.float32] = tensor.detach().numpy()
        self._file.write(values.astype("<f4", copy=False).data)
        end = self.n_bytes + tensor.nbytes
        self._table[name] = _table_entry(tensor.shape, self.n_bytes, end)
        self.n_bytes = end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._write_table()

    def _write_table(self) -> None:
        table = _as_bytes(self._table)
        if len(table) > self._table_bytes:
            raise ValueError(f"the table takes {len(table)} bytes, room was left for {self._table_bytes}")
        self._file.seek(0)
        self._file.write(self._table_bytes.to_bytes(8, "little") + table.ljust(self._table_bytes))


def table_size(tensors: Iterable[tuple[str, Iterable[int]]]) -> int:
    """Return the room in bytes that the table of a file needs for tensors of these names and shapes."""
    largest = 10**15
    entries = {name: _table_entry(shape, largest, largest) for name, shape in tensors}
    return len(_as_bytes({"__metadata__": {"format": "pt"}, **entries}))


def _table_entry(shape: Iterable[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def _as_bytes(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()
