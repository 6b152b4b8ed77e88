"""What a run has saved, and what of it is whole: the facts behind ``rwkv-train checkpoints``."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rwkv_train.checkpoints.descriptions import Json, verify_files
from rwkv_train.checkpoints.formats import MANIFEST_FILE
from rwkv_train.checkpoints.manifest import files_of, read_manifest
from rwkv_train.checkpoints.retention import read_best
from rwkv_train.checkpoints.run_folder import (
    is_checkpoint_name,
    list_checkpoint_folders,
    list_training_checkpoints,
    require_run_folder,
)
from rwkv_train.checkpoints.training_state import open_training_checkpoint
from rwkv_train.errors import CheckpointError


class SavedCheckpoint(NamedTuple):
    """Facts about a checkpoint of a run; ``None`` where its manifest does not tell or cannot be read."""

    name: str
    step: int | None
    tokens: int | None
    """Tokens trained on."""
    saved_at: str | None
    """Time of the save, ISO 8601, UTC."""
    size_bytes: int
    """Size of all its files."""
    validation_loss: float | None
    """In nats per token, where it was measured at this step."""
    marks: list[str]
    """``"newest"`` (saved last), ``"best"``, ``"milestone"``, ``"incomplete"`` (a file is missing or unreadable)."""


class Verification(NamedTuple):
    """What the files of one checkpoint are like."""

    folder: Path
    damaged: list[str]
    """Names of the files that are damaged or missing."""
    problems: list[str]
    """A sentence for each of them."""


def list_run(out_dir: str | Path) -> list[SavedCheckpoint]:
    """Return what a run has saved, lowest step first. No hash is compared; see :func:`verify_checkpoints`.

    Args:
        out_dir: folder of the run.

    Raises:
        CheckpointError: there is no checkpoint in it.
    """
    out_dir = require_run_folder(out_dir)
    complete = {folder: read_manifest(folder) for folder in list_training_checkpoints(out_dir)}
    newest = max(complete, key=lambda folder: (complete[folder]["save_number"], folder.name), default=None)
    best = read_best(out_dir)
    saved = []
    for folder in list_checkpoint_folders(out_dir):
        marks = {
            "newest": folder == newest,
            "best": best is not None and folder.name == best.checkpoint,
            "milestone": folder in complete and _is_milestone(complete[folder]),
            "incomplete": folder not in complete,
        }
        saved.append(
            _describe(folder, complete.get(folder), [mark for mark, holds in marks.items() if holds])
        )
    return saved


def verify_checkpoints(path: str | Path) -> list[Verification]:
    """Compare each file of each checkpoint with its hash.

    Args:
        path: the out_dir of a run, or the folder of one checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    path = Path(path).expanduser()
    is_one = path.is_dir() and (is_checkpoint_name(path.name) or (path / MANIFEST_FILE).exists())
    folders = [path] if is_one else list_checkpoint_folders(require_run_folder(path))
    return [Verification(folder, *_problems(folder)) for folder in folders]


def _problems(folder: Path) -> tuple[list[str], list[str]]:
    """Names of damaged files, and a sentence for each."""
    try:
        manifest = read_manifest(folder)
        names = files_of(folder, manifest)
    except CheckpointError as error:
        return [MANIFEST_FILE], [str(error)]
    problems: dict[str, str] = {}
    for name in names:
        try:
            verify_files(folder / MANIFEST_FILE, manifest["files"], [name])
        except CheckpointError as error:
            problems[name] = str(error)
    if not problems:
        try:
            open_training_checkpoint(folder, verify=False)
        except CheckpointError as error:  # files that are as they were written, and do not fit each other
            problems[MANIFEST_FILE] = str(error)
    return list(problems), list(problems.values())


def _describe(folder: Path, manifest: Json | None, marks: list[str]) -> SavedCheckpoint:
    size_bytes = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
    if manifest is None:
        return SavedCheckpoint(folder.name, None, None, None, size_bytes, None, marks)
    written = datetime.fromtimestamp((folder / MANIFEST_FILE).stat().st_mtime, UTC)
    return SavedCheckpoint(
        name=folder.name,
        step=manifest["step"],
        tokens=manifest["tokens"],
        saved_at=str(manifest.get("saved_at", written.isoformat(timespec="seconds"))),
        size_bytes=size_bytes,
        validation_loss=_validation_loss(manifest),
        marks=marks,
    )


def _validation_loss(manifest: Json) -> float | None:
    """The loss over all domains, in nats per token."""
    validation = manifest.get("validation")
    total = validation.get("total") if isinstance(validation, dict) else None
    if not isinstance(total, dict) or not total.get("tokens"):
        return None
    return float(total["nats"]) / int(total["tokens"])


def _is_milestone(manifest: Json) -> bool:
    """Whether the settings that it was saved with keep it for its step."""
    settings = manifest["config"].get("checkpoint")
    every = settings.get("keep_every_n_steps") if isinstance(settings, dict) else None
    return isinstance(every, int) and every > 0 and manifest["step"] % every == 0
