"""Which training checkpoints of a run stay: the newest few, the best, and milestones."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rwkv_train.checkpoints.descriptions import read_json, write_json
from rwkv_train.checkpoints.io import new_file, remove_folder
from rwkv_train.checkpoints.lock import hold_run_folder
from rwkv_train.checkpoints.manifest import read_manifest
from rwkv_train.checkpoints.run_folder import (
    checkpoints_folder,
    list_training_checkpoints,
    newest_valid_checkpoint,
    require_run_folder,
)
from rwkv_train.errors import CheckpointError

BEST_FILE = "best.json"
"""Name of the note beside a run's checkpoints that says which one is the best."""


class BestCheckpoint(NamedTuple):
    """The checkpoint with the lowest validation loss of a run."""

    checkpoint: str
    """Name of its folder."""
    step: int
    loss: float
    """In nats per token."""


def read_best(out_dir: str | Path) -> BestCheckpoint | None:
    """Return the note of a run's best checkpoint; ``None`` where none was validated yet.

    Raises:
        CheckpointError: the note is damaged.
    """
    path = checkpoints_folder(Path(out_dir)) / BEST_FILE
    if not path.exists():
        return None
    try:
        note = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove it to go on without") from error
    name, step, loss = (note.get(key) for key in BestCheckpoint._fields)
    if not isinstance(name, str) or not isinstance(step, int) or not isinstance(loss, float):
        raise CheckpointError(
            f"{path} does not name the best checkpoint, its step and its loss; remove it to go on without"
        )
    return BestCheckpoint(name, step, loss)


def write_best(out_dir: str | Path, best: BestCheckpoint) -> None:
    """Note which checkpoint is the best, so that it is never removed.

    Raises:
        CheckpointError: the operating system refuses; the old note is still there.
    """
    with new_file(checkpoints_folder(Path(out_dir)) / BEST_FILE, n_bytes=0) as new:
        write_json(new, best._asdict())


def prune_training_checkpoints(
    out_dir: str | Path,
    keep_last: int,
    keep: Collection[Path] = (),
    *,
    keep_every_n_steps: int | None = None,
    dry_run: bool = False,
) -> list[Path]:
    """Remove a run's complete checkpoints, but for those saved last, the best, milestones and those named.

    Args:
        out_dir: folder of the run.
        keep_last: how many of those saved last stay, at least 1.
        keep: folders that stay besides.
        keep_every_n_steps: a checkpoint whose step is a multiple of this is a milestone; ``None``: none is.
        dry_run: remove nothing.

    Returns:
        What was removed, or would be; lowest step first.

    Raises:
        CheckpointError: a folder cannot be removed, or the note of the best one is damaged.
        ValueError: a number is below 1.
    """
    for name, value in (("keep_last", keep_last), ("keep_every_n_steps", keep_every_n_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    best = read_best(out_dir)
    manifests = {folder: read_manifest(folder) for folder in list_training_checkpoints(out_dir)}
    newest_first = sorted(manifests, key=lambda folder: int(manifests[folder]["save_number"]), reverse=True)
    kept = {folder.resolve() for folder in (*keep, *newest_first[:keep_last])}
    doomed = [
        folder
        for folder, manifest in manifests.items()
        if folder.resolve() not in kept
        and not (best is not None and folder.name == best.checkpoint)
        and not (keep_every_n_steps is not None and manifest["step"] % keep_every_n_steps == 0)
    ]
    if not dry_run:
        for folder in doomed:
            remove_folder(folder)
    return doomed


def prune_run(
    out_dir: str | Path, keep_last: int, *, keep_every_n_steps: int | None = None, dry_run: bool = False
) -> list[Path]:
    """Do by hand what a run does after each save; what the run would go on from stays besides.

    Args:
        out_dir: folder of a run that is not running.
        keep_last: as in :func:`prune_training_checkpoints`.
        keep_every_n_steps: as in :func:`prune_training_checkpoints`.
        dry_run: remove nothing.

    Returns:
        What was removed, or would be; lowest step first.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or one cannot be removed.
        ConfigError: the run is going on.
    """
    out_dir = require_run_folder(out_dir)
    with hold_run_folder(out_dir):
        newest = newest_valid_checkpoint(out_dir)
        return prune_training_checkpoints(
            out_dir,
            keep_last,
            () if newest is None else (newest,),
            keep_every_n_steps=keep_every_n_steps,
            dry_run=dry_run,
        )
