"""Training checkpoints: all that the next step needs, in a folder that any number of processes can read.

``OUT_DIR/checkpoints/step-00000500/`` holds ``model.safetensors`` (float32 weights under the official
names), ``optimizer.safetensors`` (``exp_avg.NAME`` and ``exp_avg_sq.NAME``, float32) and ``manifest.json``
(everything else, and the SHA-256 of both). Nothing in it is a pickle.
"""

import base64
import binascii
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import (
    Json,
    find_problem,
    parse_model,
    parse_tokenizer,
    read_json,
    verify_files,
    write_json,
)
from rwkv_train.checkpoints.formats import CHECKPOINTS_FOLDER, FORMAT_VERSION, MANIFEST_FILE, WEIGHTS_FILE
from rwkv_train.checkpoints.infer import check_tensors
from rwkv_train.checkpoints.io import (
    OLD_PREFIX,
    new_folder,
    os_errors_as_sentences,
    remove_folder,
    remove_leftovers,
    resolve_target,
    sha256_of,
)
from rwkv_train.checkpoints.safetensors_file import read_safetensors, save_safetensors
from rwkv_train.checkpoints.tensors import size_in_bytes
from rwkv_train.errors import CheckpointError

logger = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
"""Name of Adam's moments in a training checkpoint."""

TENSOR_FILES = (WEIGHTS_FILE, OPTIMIZER_FILE)
"""The files that a manifest has hashes of."""

_MOMENTS = ("exp_avg", "exp_avg_sq")

_GIVEN_KEYS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "tokens": (int,),
    "config": (dict,),
    "tokenizer": (dict, type(None)),
    "arch_config": (dict,),
    "random": (dict,),
    "data": (dict,),
}
"""What the caller of :func:`save_training_checkpoint` puts into a manifest; other keys are kept too."""

_ALL_KEYS = {**_GIVEN_KEYS, "files": (dict,), "save_number": (int,)}
"""What a manifest on disk has. ``save_number`` counts a run's saves, those of abandoned branches too."""

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class TrainingState(NamedTuple):
    """A moment of a run, independent of the number of processes and of how they shared the work."""

    weights: dict[str, Tensor]
    """Official name -> float32 weight."""
    exp_avg: dict[str, Tensor]
    """Name -> Adam's first moment, float32; parameters that are never updated have none."""
    exp_avg_sq: dict[str, Tensor]
    """Name -> Adam's second moment, of the same names."""
    manifest: Json
    """``step``, ``tokens``, ``config``, ``tokenizer``, ``arch_config``, ``random``, ``data``
    and what else a run needs."""


def save_training_checkpoint(out_dir: str | Path, state: TrainingState) -> Path:
    """Write a checkpoint of a run; it appears whole or not at all.

    A checkpoint of the same step is replaced. What a killed save left is cleared away. In a run of several
    processes one of them calls this.

    Args:
        out_dir: folder of the run.
        state: tensors and manifest; ``format``, ``files`` and ``save_number`` are added to the manifest here.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the disk is full, or the operating system refuses; older checkpoints are untouched.
        ValueError: the manifest lacks a key, or tensors are not float32 or do not fit ``arch_config``.
    """
    manifest: Json = {"format": FORMAT_VERSION, **state.manifest}
    problem = find_problem(manifest, _GIVEN_KEYS)
    if problem is not None:
        raise ValueError(f"the manifest cannot be saved: {problem}")
    folder = _checkpoints_folder(resolve_target(out_dir)) / f"step-{manifest['step']:08d}"
    moments = {
        f"{kind}.{name}": tensor
        for kind, tensors in zip(_MOMENTS, (state.exp_avg, state.exp_avg_sq), strict=True)
        for name, tensor in tensors.items()
    }
    try:
        _check_state(folder, manifest, state.weights, moments)
    except CheckpointError as error:
        raise ValueError(str(error)) from error

    with os_errors_as_sentences(folder, "written"):
        if folder.parent.exists():
            remove_leftovers(folder.parent, lambda name: _STEP_FOLDER.fullmatch(name) is not None)
    with new_folder(folder, size_in_bytes(state.weights) + size_in_bytes(moments)) as new:
        save_safetensors(new / WEIGHTS_FILE, state.weights)
        save_safetensors(new / OPTIMIZER_FILE, moments)
        manifest["files"] = {name: sha256_of(new / name) for name in TENSOR_FILES}
        manifest["save_number"] = 1 + max(
            (read_manifest(saved)["save_number"] for saved in list_training_checkpoints(out_dir)), default=0
        )
        # Last, so that a folder with a manifest is a finished one.
        write_json(new / MANIFEST_FILE, manifest)
    return folder


def list_training_checkpoints(out_dir: str | Path) -> list[Path]:
    """Return the folders of a run's complete checkpoints, lowest step first.

    Complete means: the manifest can be read and its files are there. Their hashes are not compared.
    """
    return [folder for _, folder in sorted(_step_folders(Path(out_dir)).items()) if _is_complete(folder)]


def newest_valid_checkpoint(out_dir: str | Path, *, files: Sequence[str] = TENSOR_FILES) -> Path | None:
    """Return the checkpoint that was saved last, of those that are undamaged.

    A damaged one is passed over with a warning that names the file. After a run went back to an older
    checkpoint, what it saved since counts as newer than the higher steps of the abandoned branch.

    Args:
        out_dir: folder of the run.
        files: which files must be undamaged.

    Returns:
        Its folder, or ``None`` where the run has saved nothing yet.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    numbered: list[tuple[int, int, Path]] = []
    n_damaged = 0
    for step, folder in sorted(_step_folders(Path(out_dir)).items()):
        try:
            numbered.append((read_manifest(folder)["save_number"], step, folder))
        except CheckpointError as error:
            n_damaged += 1
            logger.warning("passed over a damaged checkpoint: %s", error)
    for _, _, folder in sorted(numbered, reverse=True):
        try:
            verify_files(folder / MANIFEST_FILE, read_manifest(folder)["files"], files)
        except CheckpointError as error:
            n_damaged += 1
            logger.warning("passed over a damaged checkpoint: %s", error)
        else:
            return folder
    if n_damaged:
        raise CheckpointError(
            f"{_checkpoints_folder(Path(out_dir))}: every checkpoint in it is damaged ({n_damaged}); restore "
            "one from a copy, or start a run in another out_dir"
        )
    return None


def read_manifest(folder: str | Path) -> Json:
    """Return the manifest of a training checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, or a key is missing or has the wrong type.
    """
    path = Path(folder) / MANIFEST_FILE
    manifest = read_json(path)
    problem = find_problem(manifest, _ALL_KEYS)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: {problem}")
    parse_tokenizer(path, manifest["tokenizer"])
    return manifest


def load_training_checkpoint(folder: str | Path) -> TrainingState:
    """Read a training checkpoint, having compared the hash of each file.

    Returns:
        Tensors on the CPU, in memory of their own.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit ``arch_config``.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    verify_files(folder / MANIFEST_FILE, manifest["files"], TENSOR_FILES)
    weights, moments = (read_safetensors(folder / name) for name in TENSOR_FILES)
    _check_state(folder, manifest, weights, moments)
    exp_avg, exp_avg_sq = (
        {
            name.removeprefix(f"{kind}."): tensor.clone()
            for name, tensor in moments.items()
            if name.startswith(f"{kind}.")
        }
        for kind in _MOMENTS
    )
    return TrainingState(
        {name: tensor.clone() for name, tensor in weights.items()}, exp_avg, exp_avg_sq, manifest
    )


def prune_training_checkpoints(out_dir: str | Path, keep_last: int, keep: set[Path]) -> None:
    """Remove a run's complete checkpoints, but for those saved last and those named.

    Args:
        out_dir: folder of the run.
        keep_last: how many of those saved last stay, at least 1.
        keep: folders that stay besides, such as that of the best validation loss.

    Raises:
        CheckpointError: a folder cannot be removed.
        ValueError: ``keep_last`` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last ({keep_last}) must be at least 1")
    kept = {folder.resolve() for folder in keep}
    newest_first = sorted(
        list_training_checkpoints(out_dir),
        key=lambda folder: read_manifest(folder)["save_number"],
        reverse=True,
    )
    for folder in newest_first[keep_last:]:
        if folder.resolve() not in kept:
            remove_folder(folder)


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


def _checkpoints_folder(out_dir: Path) -> Path:
    return out_dir.expanduser() / CHECKPOINTS_FOLDER


def _step_folders(out_dir: Path) -> dict[int, Path]:
    """Step -> folder, whatever its condition; one lost between the two renames of replacing it counts."""
    parent = _checkpoints_folder(out_dir)
    if not parent.is_dir():
        return {}
    with os_errors_as_sentences(parent, "read"):
        entries = sorted(parent.iterdir(), key=lambda entry: entry.name.startswith(OLD_PREFIX))
    found: dict[int, Path] = {}
    for entry in entries:
        match = _STEP_FOLDER.fullmatch(entry.name.removeprefix(OLD_PREFIX))
        if match is not None:
            found.setdefault(int(match[1]), entry)
    return found


def _is_complete(folder: Path) -> bool:
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError:
        return False
    return all(name in files and (folder / name).is_file() for name in TENSOR_FILES)


def _check_state(
    folder: Path, manifest: Json, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that the architecture does not have, moments without their pair, and other dtypes."""
    config = parse_model(folder / MANIFEST_FILE, manifest["arch_config"])
    check_tensors(config, weights, source=str(folder / WEIGHTS_FILE))
    for file, tensors in ((WEIGHTS_FILE, weights), (OPTIMIZER_FILE, moments)):
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(
                    f"{folder / file}: tensor '{name}' is {tensor.dtype}, expected torch.float32"
                )
    for name, tensor in moments.items():
        kind, _, parameter = name.partition(".")
        pair = _MOMENTS[1 - _MOMENTS.index(kind)] if kind in _MOMENTS else None
        if parameter not in weights or pair is None or f"{pair}.{parameter}" not in moments:
            raise CheckpointError(
                f"{folder / OPTIMIZER_FILE}: tensor '{name}' has no weight or no second moment to go with it"
            )
        if tensor.shape != weights[parameter].shape:
            raise CheckpointError(
                f"{folder / OPTIMIZER_FILE}: tensor '{name}' has shape {list(tensor.shape)}, expected "
                f"{list(weights[parameter].shape)}"
            )
