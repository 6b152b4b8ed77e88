"""The training checkpoints in a run's out_dir: which there are, and which one was saved last and is whole."""

import logging
import re
from pathlib import Path

from rwkv_train.checkpoints.formats import CHECKPOINTS_FOLDER
from rwkv_train.checkpoints.io import OLD_PREFIX, os_errors_as_sentences
from rwkv_train.checkpoints.manifest import files_of, read_manifest, verify_checkpoint
from rwkv_train.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def checkpoint_folder(out_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return checkpoints_folder(out_dir) / f"step-{step:08d}"


def checkpoints_folder(out_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return out_dir.expanduser() / CHECKPOINTS_FOLDER


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a training checkpoint may have this name."""
    return _STEP_FOLDER.fullmatch(name) is not None


def list_training_checkpoints(out_dir: str | Path) -> list[Path]:
    """Return the folders of a run's complete checkpoints, lowest step first.

    Complete means: the manifest can be read and its files are there. Their hashes are not compared.
    """
    return [folder for folder in list_checkpoint_folders(out_dir) if _is_complete(folder)]


def list_checkpoint_folders(out_dir: str | Path) -> list[Path]:
    """Return the folders of a run's checkpoints, whatever their condition, lowest step first.

    One that was lost between the two renames of replacing it is among them, under the name it has now.
    """
    parent = checkpoints_folder(Path(out_dir))
    if not parent.is_dir():
        return []
    with os_errors_as_sentences(parent, "read"):
        entries = sorted(parent.iterdir(), key=lambda entry: entry.name.startswith(OLD_PREFIX))
    found: dict[int, Path] = {}
    for entry in entries:
        match = _STEP_FOLDER.fullmatch(entry.name.removeprefix(OLD_PREFIX))
        if match is not None:
            found.setdefault(int(match[1]), entry)
    return [folder for _, folder in sorted(found.items())]


def require_run_folder(path: str | Path) -> Path:
    """Return the out_dir of a run that has saved something.

    Raises:
        CheckpointError: it holds no checkpoint, whatever its condition.
    """
    out_dir = Path(path).expanduser()
    if not list_checkpoint_folders(out_dir):
        raise CheckpointError(
            f"{out_dir} holds no training checkpoint; give the out_dir of a run, which has {CHECKPOINTS_FOLDER}/"
        )
    return out_dir


def newest_valid_checkpoint(out_dir: str | Path, *, with_optimizer: bool = True) -> Path | None:
    """Return the checkpoint that was saved last, of those that are undamaged.

    Each file of it has been compared with its hash, which need not be done again to open it. A damaged one is
    passed over with a warning that names the file. After a run went back to an older checkpoint, what it saved
    since counts as newer than the higher steps of the abandoned branch.

    Args:
        out_dir: folder of the run.
        with_optimizer: whether Adam's moments must be undamaged too.

    Returns:
        Its folder, or ``None`` where the run has saved nothing yet.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    numbered: list[tuple[int, int, Path]] = []
    n_damaged = 0
    for folder in list_checkpoint_folders(out_dir):
        try:
            manifest = read_manifest(folder)
            numbered.append((manifest["save_number"], manifest["step"], folder))
        except CheckpointError as error:
            n_damaged += 1
            logger.warning("passed over a damaged checkpoint: %s", error)
    for _, _, folder in sorted(numbered, reverse=True):
        try:
            verify_checkpoint(folder, with_optimizer=with_optimizer)
        except CheckpointError as error:
            n_damaged += 1
            logger.warning("passed over a damaged checkpoint: %s", error)
        else:
            return folder
    if n_damaged:
        raise CheckpointError(
            f"{checkpoints_folder(Path(out_dir))}: every checkpoint in it is damaged ({n_damaged}); restore "
            "one from a copy, or start a run in another out_dir"
        )
    return None


def next_save_number(out_dir: str | Path) -> int:
    """Return the number of the next save: one more than that of every complete checkpoint."""
    numbers = (read_manifest(folder)["save_number"] for folder in list_training_checkpoints(out_dir))
    return 1 + max(numbers, default=0)


def _is_complete(folder: Path) -> bool:
    try:
        names = files_of(folder, read_manifest(folder))
    except CheckpointError:
        return False
    return all((folder / name).is_file() for name in names)
