"""Where a run goes on from, and whether it may."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rwkv_train.checkpoints.descriptions import Kinds, find_problem
from rwkv_train.checkpoints.formats import FORMAT_VERSION, MANIFEST_FILE
from rwkv_train.checkpoints.manifest import verify_checkpoint
from rwkv_train.checkpoints.run_folder import list_training_checkpoints, newest_valid_checkpoint
from rwkv_train.checkpoints.training_state import TrainingCheckpoint, open_training_checkpoint
from rwkv_train.config.checkpoint import CheckpointConfig
from rwkv_train.config.guard import GuardConfig
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.run import RunConfig
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import TokenizerIdentity

logger = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"

MAY_CHANGE = {
    # Whether the data are others is seen from what is in them.
    "data": {
        "train",
        "valid",
        "cache_dir",
        "datasets",
        "valid_fraction",
        "max_tokens",
        "bad_records",
    },
    "trainer": {
        "out_dir",
        "max_steps",
        "max_tokens",
        "max_epochs",
        "micro_batch_size",
        "accelerator",
        "strategy",
        "offload",
        "deepspeed_config",
        "devices",
        "num_nodes",
        "compile",
        "grad_checkpointing",
        "wkv_backend",
        "hang_timeout_seconds",
        "grace_seconds",
        "log_every_n_steps",
        "val_every_n_steps",
        "val_tokens",
        "early_stopping_patience",
        "sample_tokens",
        "sample_prompt",
        "tensorboard",
        "wandb_project",
    },
    "checkpoint": set(CheckpointConfig.model_fields),
    "guard": set(GuardConfig.model_fields),
}
"""Settings that a resumed run may have otherwise than the run it goes on with, by section."""

MAY_CHANGE_WHOLE = frozenset({"prompts"})
"""Sections that it may have otherwise as a whole."""

MAY_CHANGE_ON_REQUEST = {
    "model": {"dropout"},
    "optim": set(OptimConfig.model_fields),
    "trainer": {"precision"},
}
"""Settings that it may have otherwise where the user names them, because they change what is learnt."""

MAY_CHANGE_WITH_THE_BASE = {"model": {"init_from"}}
"""Settings that it may have otherwise where what they name is compared by what is in it: the base of what is learned
beside it, which may have moved."""

_ONCE_FIXED: dict[str, dict[str, str]] = {"data": {"documents": "stream"}}
"""What older versions did that had no setting for it, by section."""


def find_checkpoint(
    resume: str,
    config: RunConfig,
    tokenizer: TokenizerIdentity,
    data: dict[str, object],
    processes: Processes,
    allow_change: Collection[str] = (),
) -> TrainingCheckpoint | None:
    """Return the checkpoint that a run starts from, or ``None`` for a run from scratch.

    Args:
        resume: ``"auto"`` (the newest checkpoint in ``out_dir``, if any), ``"none"``, or the path of a
            training checkpoint or of another run's folder.
        config: the settings of the run.
        tokenizer: identity of its tokenizer.
        data: identity of its training data.
        processes: the processes of the run; the first one looks and verifies, all open what it has found.
        allow_change: names of settings, such as ``"optim.lr"``, that may differ from the checkpoint's.

    Raises:
        CheckpointError: there is no valid checkpoint at the path, or ``out_dir`` holds a run that
            would be mixed with this one.
        ConfigError: a setting that must not change differs from the checkpoint's.
    """
    folder: Path | None = None
    with processes.failing_together():
        _check_names(allow_change)
        if processes.is_first:
            folder = _choose(resume, config.trainer.run_folder)
    folder = processes.broadcast(folder)
    if folder is None:
        return None
    with processes.failing_together():
        checkpoint = open_training_checkpoint(folder, verify=False)
        _check_manifest(checkpoint.manifest, folder)
        _check_same_settings(checkpoint.manifest, config, folder, allow_change)
        _check_same_data(checkpoint.manifest, tokenizer, data, folder)
    logger.info("going on from %s", folder)
    return checkpoint


def _choose(resume: str, out_dir: Path) -> Path | None:
    """Find the checkpoint and compare its files with their hashes."""
    if resume == AUTO:
        return newest_valid_checkpoint(out_dir)
    existing = list_training_checkpoints(out_dir)
    if resume == NONE:
        if existing:
            raise CheckpointError(
                f"trainer.out_dir ({out_dir}) already holds a run ({existing[-1].name}); "
                "go on with it (--resume auto), or choose another trainer.out_dir"
            )
        return None
    folder = _checkpoint_at(Path(resume).expanduser())
    if existing and folder.resolve().parent != existing[-1].resolve().parent:
        raise CheckpointError(
            f"trainer.out_dir ({out_dir}) holds a run of its own ({existing[-1].name}); "
            f"choose another trainer.out_dir to go on from {folder}"
        )
    return folder


def _check_names(allow_change: Collection[str]) -> None:
    known = [
        f"{section}.{name}" for section, names in MAY_CHANGE_ON_REQUEST.items() for name in sorted(names)
    ]
    for name in allow_change:
        if name not in known:
            raise ConfigError(f"--allow-change {name}: it is none of {', '.join(known)}")


def _checkpoint_at(path: Path) -> Path:
    if path.is_file() and (path.parent / MANIFEST_FILE).is_file():
        path = path.parent
    if (path / MANIFEST_FILE).is_file():
        verify_checkpoint(path)
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


def _check_same_settings(
    manifest: dict[str, Any], config: RunConfig, folder: Path, allow_change: Collection[str]
) -> None:
    now = to_tree(config)
    known_by_content = MAY_CHANGE_WITH_THE_BASE if "learned" in manifest else {}
    for section, saved in manifest["config"].items():
        if section in MAY_CHANGE_WHOLE:
            continue
        if not isinstance(saved, dict) or not isinstance(now.get(section), dict):
            if saved != now.get(section):
                raise ConfigError(
                    f"{section} is {now.get(section)!r} but {saved!r} in {folder}; set it back to go on with that run, "
                    "or choose another trainer.out_dir for a new one"
                )
            continue
        once = {name: value for name, value in _ONCE_FIXED.get(section, {}).items() if name in now[section]}
        for name, value in {**once, **saved}.items():
            found = now[section].get(name)
            may_change = MAY_CHANGE.get(section, set()) | known_by_content.get(section, set())
            if found == value or name in may_change:
                continue
            full_name = f"{section}.{name}"
            on_request = name in MAY_CHANGE_ON_REQUEST.get(section, set())
            if on_request and full_name in allow_change:
                logger.info("%s changes from %r to %r", full_name, value, found)
                continue
            way = f"set it back, pass --allow-change {full_name}" if on_request else "set it back"
            raise ConfigError(
                f"{full_name} is {found!r} but {value!r} in {folder}; {way} to go on with that run, or choose "
                "another trainer.out_dir for a new one"
            )


def _check_same_data(
    manifest: dict[str, Any], tokenizer: TokenizerIdentity, now: dict[str, object], folder: Path
) -> None:
    saved = TokenizerIdentity(**manifest["tokenizer"])
    if not saved.matches(tokenizer):
        raise ConfigError(
            f"the corpus was tokenized with {tokenizer.name} ({tokenizer.sha256[:12]}) but {folder} was trained "
            f"with {saved.name} ({saved.sha256[:12]}); use the same one"
        )
    before = manifest["data"]["train"]
    if before != now:
        raise ConfigError(
            f"data.train ({_describe(now)}) is not what {folder} was trained on ({_describe(before)}); use that, with "
            "the same weights in the same order, or choose another trainer.out_dir"
        )


def _describe(identity: dict[str, Any]) -> str:
    """What training data are, in a few words."""
    match identity:
        case {"mixture": [*parts]}:
            return "; ".join(f"weight {part['weight']:g}: {_describe(part)}" for part in parts)
        case {"streaming": _}:
            return "data.streaming"
        case {"conversations": [*parts]}:
            return "; ".join(f"weight {part['weight']:g}: {_describe(part)}" for part in parts)
        case {"conversations": int(count), "sha256": sha256}:
            return f"{count:,} conversations, hash {str(sha256)[:12]}"
        case {"tokens": int(n_tokens), "sha256": sha256}:
            return f"{n_tokens:,} tokens" + ("" if sha256 is None else f", hash {str(sha256)[:12]}")
        case _:
            return "unknown"
