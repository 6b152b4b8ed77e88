"""Tensors in one ``.safetensors`` file: a JSON table of names, dtypes, shapes and places, then the values.

The format cannot hold a program. It has no checksum either: a flipped bit in a value shows only where a
SHA-256 was written beside the file, as our folders and training checkpoints do.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from rwkv_train.checkpoints.tensors import as_bytes

DTYPES_BY_NAME = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What the format calls the dtypes that weights may have, and one that they may be mistaken for."""

_NAMES_BY_DTYPE = {dtype: name for name, dtype in DTYPES_BY_NAME.items()}


class SafetensorsWriter:
    """Writes tensors to one file as they come, and holds none of them.

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
        """Append a tensor on the CPU, in one of ``DTYPES_BY_NAME``."""
        self._file.write(as_bytes(tensor))
        end = self.n_bytes + tensor.nbytes
        self._table[name] = _table_entry(_NAMES_BY_DTYPE[tensor.dtype], tensor.shape, self.n_bytes, end)
        self.n_bytes = end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._write_table()

    def _write_table(self) -> None:
        table = _encoded(self._table)
        if len(table) > self._table_bytes:
            raise ValueError(f"the table takes {len(table)} bytes, room was left for {self._table_bytes}")
        self._file.seek(0)
        self._file.write(self._table_bytes.to_bytes(8, "little") + table.ljust(self._table_bytes))


def table_size(tensors: Iterable[tuple[str, Iterable[int]]]) -> int:
    """Return the room in bytes that the table of a file needs for tensors of these names and shapes."""
    largest = 10**15
    longest = max(DTYPES_BY_NAME, key=len)
    entries = {name: _table_entry(longest, shape, largest, largest) for name, shape in tensors}
    return len(_encoded({"__metadata__": {"format": "pt"}, **entries}))


def _table_entry(dtype: str, shape: Iterable[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _encoded(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()
