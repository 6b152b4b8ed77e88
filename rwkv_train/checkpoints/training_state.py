"""Training checkpoints: all that the next step needs, in a folder that any number of processes can read.

``OUT_DIR/checkpoints/step-00000500/`` holds ``model.safetensors`` (float32 weights under the official
names), ``optimizer.safetensors`` (``exp_avg.NAME`` and ``exp_avg_sq.NAME``, float32), each in several files where
it is large, and ``manifest.json`` (everything else, and the SHA-256 of each file). A run that streams its data has
``stream.safetensors`` too: tokens that it has read and not yet trained on; one in the middle of long conversations
``carried.safetensors``: their states. Nothing in it is a pickle.

A run that finetunes with parameters of its own beside a model which stays as it is (adapters, a state) stores these
alone; the manifest has their shapes and says which model they are of (``learned``).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json, find_problem, parse_model
from rwkv_train.checkpoints.formats import FORMAT_VERSION, MANIFEST_FILE
from rwkv_train.checkpoints.infer import check_tensors, expected_shapes
from rwkv_train.checkpoints.io import (
    new_folder,
    os_errors_as_sentences,
    remove_leftovers,
    resolve_target,
    sha256_of,
)
from rwkv_train.checkpoints.manifest import (
    CARRIED_FILE,
    GIVEN_KEYS,
    OPTIMIZER,
    STREAM_FILE,
    WEIGHTS,
    Shapes,
    own_shapes,
    read_manifest,
    tensor_files,
    verify_checkpoint,
    write_manifest,
)
from rwkv_train.checkpoints.run_folder import (
    checkpoint_folder,
    is_checkpoint_name,
    next_save_number,
)
from rwkv_train.checkpoints.safetensors_file import table_size
from rwkv_train.checkpoints.tensor_files import TensorFiles, TensorFilesWriter
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError

MAX_FILE_BYTES = 4_000_000_000
"""Size above which tensors go to several files, where nothing else is asked for."""

_BYTES_OF_A_WEIGHT = 12
"""A float32 weight and its two moments."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ParameterState(NamedTuple):
    """One parameter as a checkpoint holds it, in float32."""

    name: str
    """The official name."""
    weight: Tensor
    exp_avg: Tensor | None
    """Adam's first moment, of the weight's shape; ``None``: the parameter is never updated."""
    exp_avg_sq: Tensor | None
    """The second moment; ``None`` where the first one is."""


class TrainingState(NamedTuple):
    """A moment of a run in memory, independent of the number of processes and of how they shared the work."""

    weights: dict[str, Tensor]
    """Official name -> float32 weight."""
    exp_avg: dict[str, Tensor]
    """Name -> Adam's first moment, float32; parameters that are never updated have none."""
    exp_avg_sq: dict[str, Tensor]
    """Name -> Adam's second moment, of the same names."""
    manifest: Json
    """``step``, ``tokens``, ``config``, ``tokenizer``, ``arch_config``, ``random``, ``data``
    and what else a run needs."""

    def parameters(self) -> Iterator[ParameterState]:
        """Give out the parameters as :func:`save_training_checkpoint` takes them.

        Raises:
            ValueError: there is a moment of no weight.
        """
        for kind, moments in zip(_MOMENTS, (self.exp_avg, self.exp_avg_sq), strict=True):
            for name in moments:
                if name not in self.weights:
                    raise ValueError(f"tensor '{kind}.{name}' has no weight to go with it")
        for name, weight in self.weights.items():
            yield ParameterState(name, weight, self.exp_avg.get(name), self.exp_avg_sq.get(name))


class TrainingCheckpoint:
    """A training checkpoint on disk, whose names, shapes and dtypes fit its architecture.

    Args:
        folder: its folder.
        manifest: its manifest.

    Raises:
        CheckpointError: a file cannot be read, or tensors do not fit ``arch_config``.
    """

    def __init__(self, folder: Path, manifest: Json) -> None:
        self.folder = folder
        self.manifest = manifest
        self._weights = TensorFiles(folder, tensor_files(folder, manifest, WEIGHTS))
        self._moments = TensorFiles(folder, tensor_files(folder, manifest, OPTIMIZER))
        config = parse_model(folder / MANIFEST_FILE, manifest["arch_config"])
        own = own_shapes(folder / MANIFEST_FILE, manifest)
        _check_state(folder, config, own, self._weights.headers, self._moments.headers)
        shapes = expected_shapes(config) if own is None else own
        self.names = tuple(name for name in shapes if name in self._weights)
        """Names of the parameters, in the order of the model; unused ones may be absent."""

    def parameter(self, name: str) -> ParameterState:
        """Read one parameter from the disk, into memory of its own.

        Raises:
            CheckpointError: the file is damaged.
            KeyError: there is no such parameter.
        """
        exp_avg, exp_avg_sq = (
            self._moments[moment].clone() if moment in self._moments else None
            for moment in (f"{kind}.{name}" for kind in _MOMENTS)
        )
        return ParameterState(name, self._weights[name].clone(), exp_avg, exp_avg_sq)

    def weights(self) -> dict[str, Tensor]:
        """Read all weights from the disk, into memory of their own."""
        return {name: self._weights[name].clone() for name in self.names}

    def stream(self) -> dict[str, Tensor]:
        """Read what the run had of its stream; nothing where it trained on prepared corpora.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self._others(STREAM_FILE)

    def carried(self) -> dict[str, Tensor]:
        """Read the states of conversations that the run was in the middle of.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self._others(CARRIED_FILE)

    def _others(self, name: str) -> dict[str, Tensor]:
        if name not in self.manifest["files"]:
            return {}
        path = self.folder / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged: {' '.join(str(error).split())}"
            ) from error


def checkpoint_bytes(config: ModelConfig, own: Shapes | None = None) -> int:
    """Return the size in bytes that a training checkpoint of a model has at most, but for names and JSON.

    Args:
        config: the model.
        own: the parameters that it stores where these are not those of the model.
    """
    shapes = expected_shapes(config) if own is None else own
    return _BYTES_OF_A_WEIGHT * sum(math.prod(shape) for shape in shapes.values())


def save_training_checkpoint(
    out_dir: str | Path,
    manifest: Json,
    parameters: Iterable[ParameterState],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    stream: Mapping[str, Tensor] | None = None,
    carried: Mapping[str, Tensor] | None = None,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a checkpoint of a run; it appears whole or not at all.

    A checkpoint of the same step is replaced. What a killed save left is cleared away. In a run of several
    processes one of them calls this. One parameter at a time is taken, moved to the CPU and written. Where that
    fails, ``parameters`` is left where it was, neither closed nor read to its end.

    Args:
        out_dir: folder of the run.
        manifest: ``step``, ``tokens``, ``config``, ``tokenizer``, ``arch_config``, ``random``, ``data`` and what
            else a run needs; ``format``, ``files``, ``save_number``, ``saved_at`` and ``sha256`` are added here.
        parameters: every parameter of the model, or where the manifest has a section ``learned`` every one of that, in
            any order, on any device; dtypes narrower than float32 are widened.
        max_file_bytes: size above which tensors of a kind go to several files.
        stream: tensors on the CPU that :meth:`TrainingCheckpoint.stream` gives back; ``None``: there are none.
        carried: the same of :meth:`TrainingCheckpoint.carried`.
        add_files: called once the tensors are written, with the unfinished folder, to which it may add files.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the disk is full, or the operating system refuses; older checkpoints are untouched.
        ValueError: the manifest lacks a key, or parameters do not fit ``arch_config``.
    """
    if problem := find_problem({**manifest, "format": FORMAT_VERSION}, GIVEN_KEYS):
        raise ValueError(f"the manifest cannot be saved: {problem}")
    folder = checkpoint_folder(resolve_target(out_dir), manifest["step"])
    try:
        config = parse_model(folder / MANIFEST_FILE, manifest["arch_config"])
    except CheckpointError as error:
        raise ValueError(str(error)) from error

    with os_errors_as_sentences(folder, "written"):
        if folder.parent.exists():
            remove_leftovers(folder.parent, is_checkpoint_name)
    others = {STREAM_FILE: stream or {}, CARRIED_FILE: carried or {}}
    other_bytes = sum(tensor.nbytes for tensors in others.values() for tensor in tensors.values())
    own = own_shapes(folder / MANIFEST_FILE, manifest)
    with new_folder(folder, checkpoint_bytes(config, own) + other_bytes) as new:
        _write_tensors(new, folder, config, own, parameters, max_file_bytes)
        for name, tensors in others.items():
            if tensors:
                _write_others(new / name, tensors)
        add_files(new)
        content = {
            **manifest,
            "files": {path.name: sha256_of(path) for path in sorted(new.iterdir())},
            "save_number": next_save_number(out_dir),
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        # Last, so that a folder with a manifest is a finished one.
        write_manifest(new, content)
    return folder


def open_training_checkpoint(folder: str | Path, *, verify: bool = True) -> TrainingCheckpoint:
    """Open a training checkpoint; its tensors are read when they are asked for.

    Args:
        folder: its folder.
        verify: compare each file with its hash. Not needed after :func:`newest_valid_checkpoint`, which has
            done so, nor by more than one of the processes that read the same disk.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit ``arch_config``.
    """
    folder = Path(folder).expanduser()
    return TrainingCheckpoint(folder, verify_checkpoint(folder) if verify else read_manifest(folder))


def load_training_checkpoint(folder: str | Path, *, verify: bool = True) -> TrainingState:
    """Read a training checkpoint whole.

    Args:
        folder: its folder.
        verify: as in :func:`open_training_checkpoint`.

    Returns:
        Tensors on the CPU, in memory of their own.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit ``arch_config``.
    """
    checkpoint = open_training_checkpoint(folder, verify=verify)
    state = TrainingState({}, {}, {}, checkpoint.manifest)
    for name in checkpoint.names:
        parameter = checkpoint.parameter(name)
        state.weights[name] = parameter.weight
        if parameter.exp_avg is not None and parameter.exp_avg_sq is not None:
            state.exp_avg[name], state.exp_avg_sq[name] = parameter.exp_avg, parameter.exp_avg_sq
    return state


def _write_tensors(
    new: Path,
    folder: Path,
    config: ModelConfig,
    own: Shapes | None,
    parameters: Iterable[ParameterState],
    max_file_bytes: int,
) -> None:
    """Write the files of ``folder`` into ``new``."""
    shapes = expected_shapes(config) if own is None else own
    weight_table = table_size(shapes.items())
    moment_table = table_size(
        (f"{kind}.{name}", shape) for kind in _MOMENTS for name, shape in shapes.items()
    )
    with (
        TensorFilesWriter(new, WEIGHTS, weight_table, max_file_bytes) as weights,
        TensorFilesWriter(new, OPTIMIZER, moment_table, max_file_bytes) as moments,
    ):
        for name, weight, *both_moments in parameters:
            if name not in shapes:
                raise ValueError(
                    f"tensor '{name}' {list(weight.shape)} is extra; the model has no such tensor"
                )
            weights.add(name, _as_stored(name, weight))
            for kind, moment in zip(_MOMENTS, both_moments, strict=True):
                if moment is not None:
                    moments.add(f"{kind}.{name}", _as_stored(f"{kind}.{name}", moment))
        try:
            _check_state(folder, config, own, weights.headers, moments.headers)
        except CheckpointError as error:
            raise ValueError(str(error)) from error


def _write_others(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk comes as this, too
        raise OSError(str(error)) from error


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() > torch.float32.itemsize:
        raise ValueError(f"tensor '{name}' is {tensor.dtype}; a checkpoint holds torch.float32")
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _check_state(
    folder: Path,
    config: ModelConfig,
    own: Shapes | None,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Refuse tensors that the architecture does not have, moments without their pair, and other dtypes.

    Of the tensors only the shapes and dtypes are looked at.
    """
    sources = [str(folder / f"{stem}.safetensors") for stem in (WEIGHTS, OPTIMIZER)]
    if own is None:
        check_tensors(config, weights, source=sources[0])
    else:
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wrong = next((name for name in {**own, **found} if own.get(name) != found.get(name)), None)
        if wrong is not None:
            raise CheckpointError(
                f"{sources[0]}: tensor '{wrong}' has shape {found.get(wrong)}, expected {own.get(wrong)}"
            )
    for source, tensors in zip(sources, (weights, moments), strict=True):
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(f"{source}: tensor '{name}' is {tensor.dtype}, expected torch.float32")
    for name, tensor in moments.items():
        kind, _, parameter = name.partition(".")
        pair = _MOMENTS[1 - _MOMENTS.index(kind)] if kind in _MOMENTS else None
        if parameter not in weights or pair is None or f"{pair}.{parameter}" not in moments:
            raise CheckpointError(
                f"{sources[1]}: tensor '{name}' has no weight or no second moment to go with it"
            )
        if tensor.shape != weights[parameter].shape:
            raise CheckpointError(
                f"{sources[1]}: tensor '{name}' has shape {list(tensor.shape)}, expected "
                f"{list(weights[parameter].shape)}"
            )
