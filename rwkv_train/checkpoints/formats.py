"""What lies at a path, told by its content: names and endings of files are not trusted."""

import json
import re
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Literal

from rwkv_train.checkpoints.deepspeed_files import is_deepspeed_folder
from rwkv_train.checkpoints.lightning_ckpt import VERSION_KEY
from rwkv_train.checkpoints.pth import LEGACY_MAGIC, ZIP_MAGIC, mentions
from rwkv_train.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
"""Name of the weights in our folders."""

CONFIG_FILE = "config.json"
"""Name of the description beside the weights in a safetensors folder."""

MANIFEST_FILE = "manifest.json"
"""Name of the description in a training checkpoint."""

CHECKPOINTS_FOLDER = "checkpoints"
"""Name of the folder of training checkpoints in a run's out_dir."""

FORMAT_VERSION = "rwkv-train/1"
"""Value of "format" in config.json and manifest.json."""


class Format(Enum):
    """Kinds of checkpoints; the value is what a person reads."""

    PTH = "official .pth"
    LEGACY_PTH = "official .pth (before PyTorch 1.6)"
    SAFETENSORS_FILE = "safetensors file"
    SAFETENSORS_FOLDER = "safetensors folder"
    TRAINING_CHECKPOINT = "training checkpoint"
    RUN = "out_dir of a run"
    DEEPSPEED_FOLDER = "DeepSpeed checkpoint folder"
    LIGHTNING_CKPT = "Lightning .ckpt"
    HUGGING_FACE_FOLDER = "Hugging Face folder"


SourceFormat = Literal["pth", "safetensors", "hf", "training", "deepspeed", "lightning"]
"""What a user calls the kinds that are read."""

SOURCE_FORMATS: Mapping[SourceFormat, Collection[Format]] = {
    "pth": (Format.PTH, Format.LEGACY_PTH),
    "safetensors": (Format.SAFETENSORS_FILE, Format.SAFETENSORS_FOLDER),
    "hf": (Format.HUGGING_FACE_FOLDER,),
    "training": (Format.TRAINING_CHECKPOINT, Format.RUN),
    "deepspeed": (Format.DEEPSPEED_FOLDER,),
    "lightning": (Format.LIGHTNING_CKPT,),
}
"""What a user calls a kind -> the kinds that are meant."""

_FIRST_BYTES = {
    ZIP_MAGIC: Format.PTH,
    LEGACY_MAGIC: Format.LEGACY_PTH,
}

_FOREIGN_FIRST_BYTES = {
    b"GGUF": "a GGUF file, which is not supported; take the .pth or safetensors file that it was made from",
    b"\x80": "a pickle that torch.save did not write; not opened, because a pickle can hold any program",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run 'git lfs pull'",
    b"<": "a web page or XML, not weights; download the file itself",
}

_FOLDER_MARKS = {
    MANIFEST_FILE: Format.TRAINING_CHECKPOINT,
    WEIGHTS_FILE: Format.SAFETENSORS_FOLDER,
    f"{WEIGHTS_FILE}.index.json": Format.SAFETENSORS_FOLDER,
    CHECKPOINTS_FOLDER: Format.RUN,
}
"""An entry of a folder -> what the folder is; the first that is there decides."""


def recognize_format(path: Path) -> Format:
    """Return the kind of checkpoint at ``path``.

    Args:
        path: a file or folder that exists (see :func:`resolve_path`).

    Raises:
        CheckpointError: it is none that we read; the message says what it is where we know it.
    """
    try:
        return _of_folder(path) if path.is_dir() else _of_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _of_folder(folder: Path) -> Format:
    if _is_hugging_face(folder):
        return Format.HUGGING_FACE_FOLDER
    for entry, kind in _FOLDER_MARKS.items():
        if (folder / entry).exists():
            return kind
    if is_deepspeed_folder(folder):
        return Format.DEEPSPEED_FOLDER
    if (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; its weights are missing or foreign"
        )
    wanted = f"{WEIGHTS_FILE}, a training checkpoint has {MANIFEST_FILE}, a run has {CHECKPOINTS_FOLDER}/"
    raise CheckpointError(f"{folder} is not a checkpoint: a safetensors folder has {wanted}")


def _is_hugging_face(folder: Path) -> bool:
    """Tell whether a folder's ``config.json`` is one of Hugging Face's, of whatever model, and not one of ours."""
    try:
        description = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # who reads it will say so
    return isinstance(description, dict) and "model_type" in description and "format" not in description


def _of_file(path: Path) -> Format:
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise CheckpointError(f"{path} is empty")
    for magic, kind in _FIRST_BYTES.items():
        if start.startswith(magic):
            return _of_torch_save(path) if kind is Format.PTH else kind
    # A safetensors file starts with the length of a JSON object (8 bytes, of any value) and that object.
    if re.match(rb'\{[\s"}]', start[8:]):
        return Format.SAFETENSORS_FILE
    for magic, what in _FOREIGN_FIRST_BYTES.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path} is {what}")
    raise CheckpointError(
        f"{path} is not a checkpoint (a .pth or .safetensors file), or its beginning is damaged"
    )


def _of_torch_save(path: Path) -> Format:
    """What a zip file of torch.save is, told by keys that only one program writes."""
    if mentions(path, "ds_version"):
        raise CheckpointError(
            f"{path} is one of the files of a DeepSpeed checkpoint; give its folder {path.parent}"
        )
    return Format.LIGHTNING_CKPT if mentions(path, VERSION_KEY) else Format.PTH
