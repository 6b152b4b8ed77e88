"""The length of a run and the learning rate over its steps: pure functions."""

import math

from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.trainer import TrainerConfig

WARMUP_START = 0.01
"""Part of the learning rate at the first step of the warm-up."""


def total_steps(trainer: TrainerConfig, ctx_len: int, n_slots: int) -> int:
    """Return the optimizer steps of a whole run.

    Args:
        trainer: holds the length as steps, tokens or epochs, and the global batch size.
        ctx_len: tokens in one sample.
        n_slots: samples in one pass over the training corpus.
    """
    if trainer.max_steps is not None:
        return trainer.max_steps
    if trainer.max_tokens is not None:
        return math.ceil(trainer.max_tokens / (trainer.global_batch_size * ctx_len))
    assert trainer.max_epochs is not None  # the settings class holds that one of the three is set
    return math.ceil(trainer.max_epochs * n_slots / trainer.global_batch_size)


def learning_rate_factor(step: int, n_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of a step as a part of ``optim.lr``.

    The warm-up multiplies the schedule, as in the published trainer; the cosine runs from the end of the
    warm-up to the end of the run: ``optim.lr_final`` is the rate of step ``n_steps``, the first one not taken.

    Args:
        step: number of the step, from 0.
        n_steps: steps in the whole run.
        optim: the schedule.

    Source:
        RWKV-LM, ``RWKV-v7/train_temp/src/trainer.py``.
    """
    warmup = 1.0
    if step < optim.warmup_steps:
        warmup = WARMUP_START + (1 - WARMUP_START) * step / optim.warmup_steps
    if optim.schedule == "constant":
        return warmup
    floor = optim.lr_final / optim.lr
    after_warmup = max(1, n_steps - optim.warmup_steps)
    progress = min(1.0, max(0.0, (step - optim.warmup_steps) / after_warmup))
    return warmup * ((1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * progress))
