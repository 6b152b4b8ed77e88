"""The files of a DeepSpeed checkpoint: found, read with care, and all there.

Such a checkpoint is a folder named by a tag, beside a file ``latest`` that holds the newest tag::

    mp_rank_00_model_states.pt                           the module's weights (not under ZeRO 3), names, shapes
    zero_pp_rank_R_mp_rank_00_model_states.pt            the same of process R, under ZeRO 3
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     process R's partition of the optimizer

Lightning's strategy writes the same, always under the tag ``checkpoint``.

Source: the files that DeepSpeed 0.19 and Lightning 2.6 write.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rwkv_train.checkpoints.pth import read_pickle
from rwkv_train.checkpoints.stand_ins import STAND_INS
from rwkv_train.errors import CheckpointError

LATEST_FILE = "latest"
"""Name of the file that holds the tag of the newest checkpoint."""

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"\w*?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")

_Container = TypeVar("_Container", dict[Any, Any], list[Any])


class StateFile(NamedTuple):
    """A dictionary that one process wrote."""

    path: Path
    """The file that it is from, for messages."""
    content: dict[Any, Any]

    def mapping(self, key: str) -> dict[Any, Any]:
        """The dictionary under ``key``; an empty one where there is none."""
        return self._typed(key, dict)

    def sequence(self, key: str) -> list[Any]:
        """The list under ``key``; an empty one where there is none."""
        return self._typed(key, list)

    def _typed(self, key: str, kind: type[_Container]) -> _Container:
        value = self.content.get(key)
        if value is None:
            return kind()
        if isinstance(value, kind):
            return value
        raise CheckpointError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}")


class DeepSpeedFiles(NamedTuple):
    """A checkpoint's files, by rank; all of one world size where there is more than one."""

    tag: Path
    """The folder that has them."""
    models: list[StateFile]
    """Model states: one file, or one for each process under ZeRO 3."""
    optimizers: list[StateFile]
    """Optimizer states of each process; none where only weights were saved, or copied."""


def is_deepspeed_folder(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint of DeepSpeed: a tag's, or the one above it with ``latest``."""
    return (folder / LATEST_FILE).is_file() or any(
        _MODEL_FILE.fullmatch(path.name) or _OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir()
    )


def open_deepspeed_folder(folder: Path) -> DeepSpeedFiles:
    """Read the files of the checkpoint that ``latest`` names in a folder, or of a tag's folder itself.

    Returns:
        Their contents; tensors are mapped from the disk.

    Raises:
        CheckpointError: a file is missing, damaged, malicious, or from another world size or step.
    """
    tag = _tag_folder(folder)
    _refuse_split_models(tag)
    model_paths, optimizer_paths = _paths(tag, _MODEL_FILE), _paths(tag, _OPTIMIZER_FILE)
    if not model_paths:
        raise CheckpointError(f"{tag} has no file of model states, such as mp_rank_00_model_states.pt")
    models = [_read(path, "module") for path in model_paths.values()]
    for model in models:
        _require_equal("was written at step", model, models[0], lambda file: file.content.get("global_steps"))
    if not optimizer_paths:
        return DeepSpeedFiles(tag, models, [])

    optimizers = [
        StateFile(path, _read(path, "optimizer_state_dict").mapping("optimizer_state_dict"))
        for path in optimizer_paths.values()
    ]
    for optimizer in optimizers:
        _require_equal("is of a world size of", optimizer, optimizers[0], _world_size)
    world_size = _world_size(optimizers[0])
    _require_ranks(optimizer_paths, world_size)
    if len(models) > 1 or "zero_pp_rank_" in models[0].path.name:
        _require_ranks(model_paths, world_size)
    return DeepSpeedFiles(tag, models, optimizers)


def _tag_folder(folder: Path) -> Path:
    """The folder that has the files: the one that ``latest`` names, or the given one."""
    latest = folder / LATEST_FILE
    if not latest.is_file():
        return folder
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest} cannot be read: {error}") from error
    # A name, not a path: it must not lead out of the folder.
    if tag in {"", ".", ".."} or not tag.isprintable() or "/" in tag or "\\" in tag:
        raise CheckpointError(f"{latest} holds {tag[:80]!r}, which is not the name of a folder beside it")
    if not (folder / tag).is_dir():
        raise CheckpointError(f"{latest} names the checkpoint '{tag}', but there is no folder {folder / tag}")
    return folder / tag


def _refuse_split_models(tag: Path) -> None:
    for path in sorted(tag.glob("*_states.pt")):
        match = _MODEL_FILE.fullmatch(path.name) or _OPTIMIZER_FILE.fullmatch(path.name)
        if match is None or int(match["part"]) > 0:
            raise CheckpointError(
                f"{path} is of a model split by layers, experts or tensors, which is not supported"
            )


def _paths(tag: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Rank -> file, by rank; a file that is for all processes counts as rank 0's."""
    paths: dict[int, Path] = {}
    for path in sorted(tag.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        rank = int(match["rank"] or 0)
        if rank in paths:
            raise CheckpointError(
                f"{path} and {paths[rank].name} are both of rank {rank}; they are of two runs"
            )
        paths[rank] = path
    return dict(sorted(paths.items()))


def _read(path: Path, key: str) -> StateFile:
    """A file's content, which has a dictionary under ``key``."""
    content = read_pickle(path, STAND_INS)
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise CheckpointError(f"{path} is no file of DeepSpeed: it has no dictionary '{key}'")
    return StateFile(path, content)


def _world_size(optimizer: StateFile) -> int:
    """The number of processes that a process saw: told once, or for each group."""
    told = optimizer.content.get("partition_count")
    counts: list[Any] = told if isinstance(told, list) and told else [told]
    if any(not isinstance(count, int) or count < 1 or count != counts[0] for count in counts):
        raise CheckpointError(f"{optimizer.path}: partition_count ({told!r}) must be a number of processes")
    world_size: int = counts[0]
    return world_size


def _require_equal(what: str, file: StateFile, first: StateFile, fact: Any) -> None:
    if fact(file) != fact(first):
        raise CheckpointError(
            f"{file.path} {what} {fact(file)}, {first.path.name} of {fact(first)}; they are of two checkpoints"
        )


def _require_ranks(paths: Mapping[int, Path], world_size: int) -> None:
    known = next(iter(paths.values()))
    for rank in range(world_size):
        if rank not in paths:
            missing = known.with_name(re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", known.name))
            raise CheckpointError(f"{missing} is missing; the checkpoint is of {world_size} processes")
    for rank, path in paths.items():
        if rank >= world_size:
            raise CheckpointError(f"{path} is of another checkpoint: this one is of {world_size} processes")
