"""What a finetuning run does from its beginning to its end: steps, epochs, validations, checkpoints."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from rwkv_train.checkpoints.io import require_space
from rwkv_train.checkpoints.lock import LOCK_FILE, hold_run_folder
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.rows import pack
from rwkv_train.data.module import Position
from rwkv_train.errors import ConfigError
from rwkv_train.training.conversation_task import ConversationTask
from rwkv_train.training.preference_task import PreferenceTask
from rwkv_train.training.run import require_length
from rwkv_train.training.schedule import RunLength

_MOST_DEALT_ROWS = 50_000  # about a second's work; a longer run is taken to go on as it began
_LOOKED_AT_BATCHES = 8


class HeldOut(NamedTuple):
    """What each validation scores of a dataset."""

    name: str
    n_samples: int
    n_learned: int
    """Tokens whose loss counts."""


class Course(NamedTuple):
    """What a run does."""

    length: RunLength
    first_step: int
    """Steps that are done."""
    epochs: tuple[tuple[str, float], ...]
    """How often each dataset is read in the whole run."""
    n_sequences: int
    """Most sequences in one of the first micro-batches."""
    held_out: tuple[HeldOut, ...]
    n_held_out_tokens: int
    """Positions that each validation reads, filling included."""
    n_validations: int
    """That are still to come."""
    n_compared_tokens: int
    """Positions that the model before the run reads once, for DPO."""
    n_checkpoints: int
    """Most that there are at once."""

    @property
    def n_steps(self) -> int:
        """Steps that are still to be done."""
        return self.length.n_steps - self.first_step


def follow(task: ConversationTask | PreferenceTask, first_step: int) -> Course:
    """Work out the course of a run.

    Args:
        task: the run, with its data read.
        first_step: steps that are done.

    Raises:
        ConfigError: more steps are done than the run has.
    """
    config = task.config
    length = task.run_length()
    require_length(length, first_step)
    n_validations = 0
    if task.valid:
        n_validations = (first_step == 0) + _times(
            config.trainer.val_every_n_steps, first_step, length.n_steps
        )
    held_out = [sample for samples in task.valid.values() for sample in samples]
    compared = []
    if config.preference is not None and config.preference.loss == "dpo" and first_step == 0:
        compared = [*held_out, *(pair for pairs in task.samples.datasets for pair in pairs)]
    return Course(
        length=length,
        first_step=first_step,
        epochs=_epochs(task, length.n_steps),
        n_sequences=_most_sequences(task, length.n_steps),
        held_out=tuple(
            HeldOut(name, len(samples), sum(sample.n_learned for sample in samples))
            for name, samples in task.valid.items()
        ),
        n_held_out_tokens=_row_tokens([sample.n_inputs for sample in held_out], config.model.ctx_len),
        n_validations=n_validations,
        n_compared_tokens=_row_tokens([sample.n_inputs for sample in compared], config.model.ctx_len),
        n_checkpoints=_most_checkpoints(config, first_step, length.n_steps, n_validations),
    )


def check_folder(out_dir: Path) -> None:
    """Refuse a folder that a run could not write to, without making it.

    Raises:
        ConfigError: the operating system would refuse, or another run is using it.
    """
    there = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(
            f"trainer.out_dir ({out_dir}) cannot be made: {there} is a file; choose another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"trainer.out_dir ({out_dir}) cannot be written to; choose another folder")
    if (out_dir / LOCK_FILE).exists():
        with hold_run_folder(out_dir):
            pass


def check_space(config: FinetuneConfig, checkpoint_bytes: int, n_checkpoints: int) -> None:
    """Refuse a disk that the checkpoints of a run will fill.

    Args:
        config: the settings of the run.
        checkpoint_bytes: size of one.
        n_checkpoints: how many there are at once.

    Raises:
        CheckpointError: there is no room for one.
        ConfigError: there is no room for all.
    """
    out_dir = config.trainer.run_folder
    require_space(out_dir, checkpoint_bytes)
    free = free_bytes(out_dir)
    if n_checkpoints * checkpoint_bytes > free:
        raise ConfigError(
            f"trainer.out_dir ({out_dir}) will hold {n_checkpoints} checkpoints at once of up to "
            f"{checkpoint_bytes / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free; lower checkpoint.keep_last, "
            "free some space or choose another disk"
        )


def free_bytes(out_dir: Path) -> int:
    """Return the room on the disk where a folder is, or would be made."""
    there = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _times(every: int, first_step: int, n_steps: int) -> int:
    """Count the steps after which something is done that is done at an interval and at the end."""
    return n_steps // every - first_step // every + (n_steps > first_step and n_steps % every > 0)


def _epochs(task: ConversationTask | PreferenceTask, n_steps: int) -> tuple[tuple[str, float], ...]:
    n_dealt = min(n_steps, max(1, _MOST_DEALT_ROWS // task.config.trainer.global_batch_size))
    read = task.samples.dealer.step(n_dealt - 1).n_tokens
    sizes = [sum(sample.n_inputs for sample in dataset) for dataset in task.samples.datasets]
    names = [dataset.name for dataset in task.config.data.datasets]
    return tuple(
        (name, tokens / size * n_steps / n_dealt)
        for name, tokens, size in zip(names, read, sizes, strict=True)
    )


def _most_sequences(task: ConversationTask | PreferenceTask, n_steps: int) -> int:
    batches = task.batches(0, Position(0), n_steps)
    looked_at = [batches[number].cu_seqlens for number in range(min(_LOOKED_AT_BATCHES, len(batches)))]
    return max(len(cu_seqlens) - 1 for cu_seqlens in looked_at if cu_seqlens is not None)


def _row_tokens(lengths: list[int], ctx_len: int) -> int:
    return ctx_len * sum(map(len, pack(lengths, ctx_len)))


def _most_checkpoints(config: FinetuneConfig, first_step: int, n_steps: int, n_validations: int) -> int:
    settings = config.checkpoint
    n_saved = _times(settings.every_n_steps, first_step, n_steps) + n_validations
    milestones = settings.keep_every_n_steps
    n_milestones = 0 if milestones is None else n_steps // milestones
    # Old ones are removed when a new one is whole.
    return min(n_saved + n_milestones, settings.keep_last + config.has_validation + n_milestones + 1)
