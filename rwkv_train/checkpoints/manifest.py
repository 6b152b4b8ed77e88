"""The manifest of a training checkpoint: all that is no tensor, and the SHA-256 of each file beside it.

``sha256`` in it is that of its own text with zeros in place of this hash, so that a flipped bit shows. Manifests
of ``rwkv-train/1`` have none; they are read, and only newer ones are written.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import (
    Json,
    Kinds,
    find_problem,
    json_text,
    parse_json,
    parse_tokenizer,
    read_bytes,
    verify_files,
)
from rwkv_train.checkpoints.formats import FORMAT_VERSION, MANIFEST_FILE
from rwkv_train.checkpoints.tensor_files import index_name, tensor_file_names
from rwkv_train.errors import CheckpointError

MANIFEST_VERSION = "rwkv-train/2"
"""Value of "format" in a manifest. ``rwkv-train/1`` had no hash of its own and one file of each kind."""

WEIGHTS = "model"
"""Begins the names of the files of weights."""

OPTIMIZER = "optimizer"
"""Begins the names of the files of Adam's moments."""

STREAM_FILE = "stream.safetensors"
"""Name of the file of tokens that a run which streams its data has read and not yet trained on."""

CARRIED_FILE = "carried.safetensors"
"""Name of the file of states with which long conversations go on."""

STATE_FILE = "state.safetensors"
"""Name of the file of a learned state, as texts are read from it."""

GIVEN_KEYS: Kinds = {
    "step": (int,),
    "tokens": (int,),
    "config": (dict,),
    "tokenizer": (dict, type(None)),
    "arch_config": (dict,),
    "random": (dict,),
    "data": (dict,),
}
"""What a run puts into a manifest; other keys are kept too."""

_ALL_KEYS: Kinds = {**GIVEN_KEYS, "files": (dict,), "save_number": (int,)}
"""What a manifest on disk has. ``save_number`` counts a run's saves, those of abandoned branches too."""

_LEARNED_KEYS: Kinds = {"parameters": (dict,), "base": (dict,), "method": (str,)}

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a parameter -> its shape."""

_NO_HASH = "0" * 64


def read_manifest(folder: str | Path) -> Json:
    """Return the manifest of a training checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, or a key is missing or has the wrong type.
    """
    path = Path(folder) / MANIFEST_FILE
    raw = read_bytes(path)
    manifest = parse_json(path, raw)
    if manifest.get("format") == MANIFEST_VERSION:
        _require_own_hash(path, raw, manifest)
    elif manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} cannot be used: its format is {manifest.get('format')!r}, but this version reads "
            f"'{FORMAT_VERSION}' and '{MANIFEST_VERSION}'"
        )
    if problem := find_problem({**manifest, "format": FORMAT_VERSION}, _ALL_KEYS):
        raise CheckpointError(f"{path} cannot be used: {problem}")
    parse_tokenizer(path, manifest["tokenizer"])
    return manifest


def write_manifest(folder: Path, manifest: Json) -> None:
    """Write a manifest with its version and its own hash; NaN and infinity are refused (``ValueError``)."""
    rest = {key: value for key, value in manifest.items() if key not in {"format", "sha256"}}
    # The hash comes second, so that its zeros are the first of the text.
    text = json_text({"format": MANIFEST_VERSION, "sha256": _NO_HASH, **rest})
    text = text.replace(_NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8", newline="\n")


def own_shapes(path: Path, manifest: Json) -> Shapes | None:
    """Return the shapes of the parameters that a checkpoint stores where it is not those of a model; else ``None``.

    Args:
        path: the manifest's, for the message.
        manifest: of the checkpoint.

    Raises:
        CheckpointError: the section ``learned`` is damaged.
    """
    learned = manifest.get("learned")
    if learned is None:
        return None
    problem = (
        find_problem({**learned, "format": FORMAT_VERSION}, _LEARNED_KEYS)
        if isinstance(learned, dict)
        else "it is no section"
    )
    if problem is None and not all(
        isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)
        for shape in learned["parameters"].values()
    ):
        problem = "parameters have no shapes"
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: the section 'learned': {problem}")
    return {name: tuple(shape) for name, shape in learned["parameters"].items()}


def tensor_files(folder: Path, manifest: Json, stem: str) -> list[str]:
    """Return the names of the files that hold a checkpoint's tensors of one kind.

    Raises:
        CheckpointError: the manifest does not name all of them.
    """
    names = tensor_file_names(stem, manifest["files"])
    for name in names:
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder / MANIFEST_FILE}: 'files' does not name {name}")
    return names


def files_of(folder: Path, manifest: Json, *, with_optimizer: bool = True) -> list[str]:
    """Return the names of a checkpoint's files but the manifest, indices included.

    Without the optimizer's, those are the files of weights alone, with it all that the manifest names.

    Raises:
        CheckpointError: as in :func:`tensor_files`.
    """
    files: list[str] = []
    for stem in (WEIGHTS, OPTIMIZER) if with_optimizer else (WEIGHTS,):
        names = tensor_files(folder, manifest, stem)
        files += names if len(names) == 1 else [*names, index_name(stem)]
    if with_optimizer:
        files += [name for name in manifest["files"] if name not in files]
    return files


def verify_checkpoint(folder: Path, *, with_optimizer: bool = True) -> Json:
    """Compare each file of a checkpoint with its hash, and return the manifest.

    Raises:
        CheckpointError: it names the first file that is missing or damaged.
    """
    manifest = read_manifest(folder)
    names = files_of(folder, manifest, with_optimizer=with_optimizer)
    verify_files(folder / MANIFEST_FILE, manifest["files"], names)
    return manifest


def encode_random_state(state: Tensor) -> str:
    """Return the state of a PyTorch generator (uint8, one dimension) as text for a manifest."""
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def decode_random_state(text: str) -> Tensor:
    """Return what :func:`encode_random_state` was given.

    Raises:
        CheckpointError: the text is damaged.
    """
    try:
        return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
    except (binascii.Error, ValueError, TypeError) as error:
        raise CheckpointError(f"the random state of a {MANIFEST_FILE} is damaged: {error}") from error


def _require_own_hash(path: Path, raw: bytes, manifest: Json) -> None:
    stated = manifest.get("sha256")
    if not isinstance(stated, str) or re.fullmatch("[0-9a-f]{64}", stated) is None:
        raise CheckpointError(f"{path} is damaged: it has no SHA-256 of its own")
    found = hashlib.sha256(raw.replace(stated.encode(), _NO_HASH.encode(), 1)).hexdigest()
    if found != stated:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {found}, but it says {stated}")
