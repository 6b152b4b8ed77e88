"""Where a run goes on from, and whether it may."""

import logging
from pathlib import Path
from typing import Any

from rwkv_train.checkpoints.descriptions import Kinds, find_problem
from rwkv_train.checkpoints.formats import FORMAT_VERSION, MANIFEST_FILE
from rwkv_train.checkpoints.training_state import (
    TENSOR_FILES,
    TrainingState,
    list_training_checkpoints,
    load_training_checkpoint,
    newest_valid_checkpoint,
)
from rwkv_train.config.save import to_tree
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.stored import Corpus
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.tokenizers import TokenizerIdentity
from rwkv_train.training.keeper import identify_corpus

logger = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"

MAY_CHANGE = {
    "data": {"train", "valid", "cache_dir"},
    "trainer": {
        "out_dir",
        "max_steps",
        "max_tokens",
        "max_epochs",
        "micro_batch_size",
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "wkv_backend",
        "log_every_n_steps",
        "val_every_n_steps",
        "val_tokens",
        "sample_tokens",
        "sample_prompt",
        "tensorboard",
        "wandb_project",
    },
    "checkpoint": {"every_n_steps", "keep_last"},
}
"""Settings that a resumed run may have otherwise than the run it goes on with, by section."""


def find_resume_state(
    resume: str, config: TrainConfig, tokenizer: TokenizerIdentity, corpus: Corpus
) -> TrainingState | None:
    """Return the state that a run starts from, or ``None`` for a run from scratch.

    Args:
        resume: ``"auto"`` (the newest checkpoint in ``out_dir``, if any), ``"none"``, or the path of a
            training checkpoint or of another run's folder.
        config: the settings of the run.
        tokenizer: identity of its corpus' tokenizer.
        corpus: its training corpus.

    Raises:
        CheckpointError: there is no valid checkpoint at the path, or ``out_dir`` holds a run that
            would be mixed with this one.
        ConfigError: a setting that must not change differs from the checkpoint's.
    """
    out_dir = config.trainer.run_folder
    existing = list_training_checkpoints(out_dir)
    if resume == NONE:
        if existing:
            raise CheckpointError(
                f"trainer.out_dir ({out_dir}) already holds a run ({existing[-1].name}); "
                "go on with it (--resume auto), or choose another trainer.out_dir"
            )
        return None
    if resume == AUTO:
        folder = newest_valid_checkpoint(out_dir)
        if folder is None:
            return None
    else:
        folder = _checkpoint_at(Path(resume).expanduser())
        if existing and folder.resolve().parent != existing[-1].resolve().parent:
            raise CheckpointError(
                f"trainer.out_dir ({out_dir}) holds a run of its own ({existing[-1].name}); "
                f"choose another trainer.out_dir to go on from {folder}"
            )
    state = load_training_checkpoint(folder)
    _check_manifest(state.manifest, folder)
    _check_same_settings(state.manifest, config, folder)
    _check_same_data(state.manifest, tokenizer, corpus, folder)
    logger.info("going on from %s", folder)
    return state


def _checkpoint_at(path: Path) -> Path:
    if path.name in {MANIFEST_FILE, *TENSOR_FILES} and path.is_file():
        path = path.parent
    if (path / MANIFEST_FILE).is_file():
        return path
    newest = newest_valid_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise CheckpointError(
            f"--resume {path}: there is no training checkpoint; give auto, none, or the path of one "
            "(OUT_DIR/checkpoints/step-NUMBER) or of a run's out_dir"
        )
    return newest


def _check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Refuse a manifest without what only a resumed run needs."""
    needed: list[tuple[dict[str, Any], Kinds]] = [
        (manifest, {"train_seconds": (int, float), "tokenizer": (dict,)}),
        (manifest["config"], dict.fromkeys(("model", "data", "optim", "trainer", "checkpoint"), (dict,))),
        (manifest["random"], {"cpu": (str,)}),
        (manifest["data"], {"train": (dict,)}),
    ]
    for content, kinds in needed:
        problem = find_problem({**content, "format": FORMAT_VERSION}, kinds)
        if problem is not None:
            raise CheckpointError(f"{folder / MANIFEST_FILE} cannot be used: {problem}")


def _check_same_settings(manifest: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    now = to_tree(config)
    for section, saved in manifest["config"].items():
        for name, value in saved.items():
            if name in MAY_CHANGE.get(section, set()) or now[section].get(name) == value:
                continue
            raise ConfigError(
                f"{section}.{name} is {now[section].get(name)!r} but {value!r} in {folder}; set it back to go on "
                "with that run, or choose another trainer.out_dir for a new one"
            )


def _check_same_data(
    manifest: dict[str, Any], tokenizer: TokenizerIdentity, corpus: Corpus, folder: Path
) -> None:
    saved = TokenizerIdentity(**manifest["tokenizer"])
    if not saved.matches(tokenizer):
        raise ConfigError(
            f"the corpus was tokenized with {tokenizer.name} ({tokenizer.sha256[:12]}) but {folder} was trained "
            f"with {saved.name} ({saved.sha256[:12]}); use the same one"
        )
    before, now = manifest["data"]["train"], identify_corpus(corpus)
    if before != now:
        raise ConfigError(
            f"data.train ({corpus.prefix}, {now['tokens']:,} tokens) is not the corpus that {folder} was trained "
            f"on ({before['tokens']:,} tokens); use that one, or choose another trainer.out_dir"
        )
