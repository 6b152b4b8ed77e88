"""The files in which a Hugging Face folder keeps its tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from rwkv_train.checkpoints.descriptions import read_json, shortened
from rwkv_train.checkpoints.pth import read_pth
from rwkv_train.checkpoints.tensor_files import TensorFiles
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import require_dense, require_floats
from rwkv_train.errors import CheckpointError


def open_weight_files(folder: Path) -> TensorSource:
    """Return the tensors of a folder under the names that they have there, none of them read yet.

    The first of these that is there: ``model.safetensors``, ``model.safetensors.index.json`` with its files,
    ``pytorch_model.bin`` (read as a ``.pth`` is, by ``weights_only=True``), ``pytorch_model.bin.index.json``.

    Raises:
        CheckpointError: there is none, a file is missing or damaged, or a tensor is no float.
    """
    for name, open_files in _KINDS.items():
        if (folder / name).is_file():
            return open_files(folder, [name])
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed(index, open_files)
    raise CheckpointError(
        f"{folder} has no weights: a Hugging Face folder has {' or '.join(_KINDS)}, or an index of several"
    )


def _indexed(path: Path, open_files: Callable[[Path, list[str]], TensorSource]) -> TensorSource:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map' that says which file holds a tensor")
    for name, file in weight_map.items():
        place = f"{path}: tensor '{shortened(name)}' is in {shortened(repr(file))}"
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{place}, which is no name of a file beside it")
        if not _is_file(path.parent / file):
            raise CheckpointError(f"{place}, which cannot be read: there is no such file")
    tensors = open_files(path.parent, sorted(set(weight_map.values())))
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor '{name}' is not in {file}")
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _open_safetensors(folder: Path, names: list[str]) -> TensorSource:
    files = TensorFiles(folder, names)
    require_floats(folder, files)
    return files


def _open_pickles(folder: Path, names: list[str]) -> TensorSource:
    tensors: dict[str, Tensor] = {}
    for path in (folder / name for name in names):
        content = read_pth(path)
        require_dense(path, content)
        if both := tensors.keys() & content.keys():
            raise CheckpointError(f"{path}: tensor '{min(both)}' is in another file too")
        tensors |= content
    source = TensorSource.of(tensors)
    require_floats(folder, source)
    return source


_KINDS: Mapping[str, Callable[[Path, list[str]], TensorSource]] = {
    "model.safetensors": _open_safetensors,
    "pytorch_model.bin": _open_pickles,
}
"""Name of the only file -> what opens it, or the files of an index."""
