"""Tensors of one kind in one safetensors file, or in several of a bounded size with an index.

``model.safetensors`` while they are few, else ``model-00001-of-00003.safetensors`` and so on beside
``model.safetensors.index.json``, the layout in which large models are published: ``weight_map`` says which file
holds a tensor, ``metadata.total_size`` how many bytes all values take.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import safetensors
import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import write_json
from rwkv_train.checkpoints.safetensors_file import DTYPES_BY_NAME, SafetensorsWriter, table_size
from rwkv_train.checkpoints.tensor_source import TensorSource, header_of
from rwkv_train.errors import CheckpointError

MAX_FILE_BYTES = 5_000_000_000
"""Size above which tensors of a kind go to several files, as published models do."""


class TensorFilesWriter:
    """Writes tensors as they come, and holds none of them; see :class:`SafetensorsWriter`.

    Args:
        folder: where the files go.
        stem: the beginning of their names: ``"model"``, ``"optimizer"``.
        table_bytes: room for the table of a file that holds all tensors.
        max_file_bytes: a tensor with which a file would be larger goes to a new one.
    """

    def __init__(self, folder: Path, stem: str, table_bytes: int, max_file_bytes: int) -> None:
        self.headers: dict[str, Tensor] = {}
        """Name -> a tensor of the shape and dtype that were written, without values."""
        self._folder = folder
        self._stem = stem
        self._table_bytes = table_bytes
        self._max_file_bytes = max_file_bytes
        self._unnamed: list[Path] = []  # how many there are, and so their names, is known at the end
        self._file_of: dict[str, int] = {}
        self._total_bytes = 0
        self._current: SafetensorsWriter
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._next_file()
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor on the CPU.

        Raises:
            ValueError: a tensor of that name is already there.
        """
        if name in self._file_of:
            raise ValueError(f"there are two tensors '{name}'")
        if self._current.n_bytes and self._current.n_bytes + tensor.nbytes > self._max_file_bytes:
            self._stack.close()
            self._next_file()
        self._current.add(name, tensor)
        self.headers[name] = header_of(tensor)
        self._file_of[name] = len(self._unnamed)
        self._total_bytes += tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            self._give_names()

    def _next_file(self) -> None:
        path = self._folder / f"{self._stem}-{len(self._unnamed) + 1:05d}.unfinished"
        self._unnamed.append(path)
        self._current = self._stack.enter_context(SafetensorsWriter(path, self._table_bytes))

    def _give_names(self) -> None:
        n_files = len(self._unnamed)
        names = [_name(self._stem, number, n_files) for number in range(1, n_files + 1)]
        for path, name in zip(self._unnamed, names, strict=True):
            path.rename(self._folder / name)
        if n_files > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": {tensor: names[number - 1] for tensor, number in self._file_of.items()},
            }
            write_json(self._folder / index_name(self._stem), index)


def write_tensor_files(folder: Path, stem: str, tensors: TensorSource) -> list[str]:
    """Write all tensors of a source, one at a time, to one file or to several of ``MAX_FILE_BYTES``.

    Args:
        folder: as for :class:`TensorFilesWriter`.
        stem: likewise.
        tensors: what to write.

    Returns:
        Names of the files that hold them.
    """
    table_bytes = table_size((name, header.shape) for name, header in tensors.headers.items())
    # Wide dtypes first: readers need each tensor at a multiple of its own width, and the format knows no gaps.
    by_width = sorted(tensors, key=lambda name: -tensors.headers[name].element_size())
    with TensorFilesWriter(folder, stem, table_bytes, MAX_FILE_BYTES) as files:
        for name in by_width:
            files.add(name, tensors[name])
    return tensor_file_names(stem, [path.name for path in folder.iterdir()])


class TensorFiles(TensorSource):
    """The tensors of several safetensors files, mapped from the disk.

    Args:
        folder: where the files lie.
        names: their names.

    Raises:
        CheckpointError: a file is missing, or no safetensors file, or holds a tensor that another one holds.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._files: dict[Path, Any] = {}
        self._path_of: dict[str, Path] = {}
        headers: dict[str, Tensor] = {}
        for path in (folder / name for name in names):
            for name, header in self._open(path).items():
                if name in headers:
                    raise CheckpointError(f"{path}: tensor '{name}' is in {self._path_of[name].name} too")
                headers[name] = header
                self._path_of[name] = path
        super().__init__(headers, self._read_from_file)

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._path_of[name]

    def _read_from_file(self, name: str) -> Tensor:
        path = self._path_of[name]
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged: {' '.join(str(error).split())}"
            ) from error
        return tensor

    def _open(self, path: Path) -> Mapping[str, Tensor]:
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} cannot be read: No such file or directory") from error
        except Exception as error:  # bytes that someone made up can raise anything
            raise CheckpointError(
                f"{path} is truncated or damaged: {' '.join(str(error).split())}"
            ) from error
        self._files[path] = file
        for name, found in slices.items():
            if found.get_dtype() not in DTYPES_BY_NAME:
                raise CheckpointError(f"{path}: tensor '{name}' is {found.get_dtype()}, which no weight is")
        return {
            name: torch.empty(found.get_shape(), dtype=DTYPES_BY_NAME[found.get_dtype()], device="meta")
            for name, found in slices.items()
        }


def tensor_file_names(stem: str, listed: Collection[str]) -> list[str]:
    """Return the names that the files of one kind must have.

    Args:
        stem: the beginning of their names.
        listed: names of files; one of several that belong together tells how many there are.
    """
    for name in sorted(listed):
        if place := _place_of(stem, name):
            # One more than are listed is enough to find that some are missing, however large the number is.
            n_names = min(place.n_files, len(listed) + 1)
            return [_name(stem, number, place.n_files) for number in range(1, n_names + 1)]
    return [_name(stem, 1, 1)]


def is_tensor_file(stem: str, name: str) -> bool:
    """Tell whether a name is one that :class:`TensorFilesWriter` gives."""
    place = _place_of(stem, name) or _Place(1, 1)
    return name in {index_name(stem), _name(stem, *place)}


def index_name(stem: str) -> str:
    """Return the name of the index beside several files."""
    return f"{stem}.safetensors.index.json"


class _Place(NamedTuple):
    number: int
    n_files: int


def _place_of(stem: str, name: str) -> _Place | None:
    """Which of how many files has this name; ``None``: none of several."""
    match = re.fullmatch(re.escape(stem) + r"-([0-9]{5,9})-of-([0-9]{5,9})\.safetensors", name)
    place = _Place(int(match[1]), int(match[2])) if match else None
    return place if place and 1 <= place.number <= place.n_files else None


def _name(stem: str, number: int, n_files: int) -> str:
    return f"{stem}.safetensors" if n_files == 1 else f"{stem}-{number:05d}-of-{n_files:05d}.safetensors"
