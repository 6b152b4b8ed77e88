"""The length of a run, and learning rate and weight decay over its steps: pure functions."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.trainer import TrainerConfig


class RunLength(NamedTuple):
    """How long a whole run is, over all its resumptions."""

    n_steps: int
    """Optimizer steps."""
    tokens_per_step: int
    """Tokens that one step reads, over all devices."""
    n_tokens: int
    """Tokens by which the schedule ends: ``max_tokens`` where that is the setting, else those of all steps."""


def run_length(trainer: TrainerConfig, ctx_len: int, n_slots: int) -> RunLength:
    """Return how long a whole run is.

    Args:
        trainer: holds the length as steps, tokens or epochs, and the global batch size.
        ctx_len: tokens in one sample.
        n_slots: samples in one pass over the training corpus.
    """
    n_steps = None
    if trainer.max_epochs is not None:
        n_steps = math.ceil(trainer.max_epochs * n_slots / trainer.global_batch_size)
    return length_of(trainer, ctx_len, n_steps)


def length_of(trainer: TrainerConfig, ctx_len: int, n_steps: int | None) -> RunLength:
    """Return how long a whole run is.

    Args:
        trainer: holds the length as steps or tokens, and the global batch size.
        ctx_len: tokens in one sample.
        n_steps: the length in steps where ``trainer`` has it in epochs, else ``None``.
    """
    tokens_per_step = trainer.global_batch_size * ctx_len
    if trainer.max_tokens is not None:
        return RunLength(-(-trainer.max_tokens // tokens_per_step), tokens_per_step, trainer.max_tokens)
    if n_steps is None:
        n_steps = trainer.max_steps
    assert n_steps is not None  # the settings class holds that one of the three is set
    return RunLength(n_steps, tokens_per_step, n_steps * tokens_per_step)


def learning_rate(step: int, length: RunLength, optim: OptimConfig) -> float:
    """Return the learning rate of a step, for parameters whose factor is 1.

    Progress is counted in tokens, from the end of the warm-up (under ``"wsd"``: from the beginning of its decay)
    to the end of the run, where the rate would be ``optim.lr_final``. The warm-up multiplies the schedule. So the
    rate depends on the number of the step alone, and a resumed run does not warm up again.

    Args:
        step: number of the step over the whole run, from 0.
        length: length of the run.
        optim: the schedule.

    Source:
        RWKV-LM, ``RWKV-v7/train_temp/src/trainer.py`` (cosine) and ``RWKV-v4neo/src/trainer.py`` (exponential,
        linear, and constant before an exponential decay); Hu et al. 2024, "MiniCPM", arXiv:2404.06395 (WSD);
        Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
        arXiv:2405.18392 (its 1-sqrt decay).
    """
    return optim.lr * _factor(step, length, optim)


def weight_decay(step: int, length: RunLength, optim: OptimConfig) -> float:
    """Return the weight decay of a step, for parameters that decay.

    It goes from ``optim.weight_decay`` to ``optim.weight_decay_final`` exponentially (a straight line on a
    logarithmic scale), with progress in tokens from the end of the warm-up to that of the run, under every
    schedule.

    Args:
        step: number of the step over the whole run, from 0.
        length: length of the run.
        optim: both values.

    Source:
        RWKV-LM, ``RWKV-v5/src/trainer.py``.
    """
    if optim.weight_decay_final is None:
        return optim.weight_decay
    progress = _progress(step, length, first_token=optim.warmup_steps * length.tokens_per_step)
    return math.pow(optim.weight_decay, 1 - progress) * math.pow(optim.weight_decay_final, progress)


def _factor(step: int, length: RunLength, optim: OptimConfig) -> float:
    """The learning rate of a step as a part of ``optim.lr``."""
    warmup = 1.0
    if step < optim.warmup_steps:
        warmup = optim.warmup_start + (1 - optim.warmup_start) * step / optim.warmup_steps
    if optim.schedule == "constant":
        return warmup
    shape: str = optim.schedule
    first_token: float = optim.warmup_steps * length.tokens_per_step
    if optim.schedule == "wsd":
        assert optim.wsd_decay is not None  # the settings class fills both in
        assert optim.wsd_decay_fraction is not None
        shape = optim.wsd_decay
        first_token = max(first_token, (1 - optim.wsd_decay_fraction) * length.n_tokens)
    progress = _progress(step, length, first_token=first_token)
    return warmup * _SHAPES[shape](progress, optim.lr_final / optim.lr)


def _progress(step: int, length: RunLength, *, first_token: float) -> float:
    """Part of the tokens from ``first_token`` to the end of the run that are read before a step, 0 to 1."""
    done = step * length.tokens_per_step - first_token
    return min(1.0, max(0.0, done / max(1.0, length.n_tokens - first_token)))


# From 1 at the beginning (progress p = 0) to the floor f at the end (p = 1).
_SHAPES: Mapping[str, Callable[[float, float], float]] = {
    "cosine": lambda p, f: (1 + f) / 2 + (1 - f) / 2 * math.cos(math.pi * p),
    "linear": lambda p, f: 1 + (f - 1) * p,
    "exponential": lambda p, f: math.pow(f, p),
    "sqrt": lambda p, f: f + (1 - f) * (1 - math.sqrt(p)),
}
