"""What a run reports of itself between two log rows: loss, gradient, speed."""

import time
from typing import NamedTuple

import torch
from torch import Tensor


class StepMetrics(NamedTuple):
    """Means over the steps since the last row."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    tokens_per_second: float
    """Tokens of all devices, per second spent in training steps."""


class Meter:
    """Collects steps; reads them off the device only when a row is due, so that training never waits."""

    def __init__(self, tokens_per_step: int, seconds: float = 0.0) -> None:
        self.seconds = seconds
        """Time spent in training steps since the very start of the run, in seconds."""
        self._tokens_per_step = tokens_per_step
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._started: float | None = None
        self._interval_seconds = 0.0

    def start(self) -> None:
        """Note that a micro-batch begins."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Note that a micro-batch has ended; what comes before the next one is not training."""
        assert self._started is not None
        elapsed = time.perf_counter() - self._started
        self._started = None
        self.seconds += elapsed
        self._interval_seconds += elapsed

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Note one finished optimizer step; both are scalars on the device."""
        self._losses.append(loss.detach())
        self._norms.append(grad_norm.detach())

    def read(self, mean_over_ranks: "MeanOverRanks") -> StepMetrics:
        """Return the means since the last call and start anew."""
        n_steps = len(self._losses)
        loss = mean_over_ranks(torch.stack(self._losses).mean())
        norm = torch.stack(self._norms).mean()
        metrics = StepMetrics(
            float(loss), float(norm), n_steps * self._tokens_per_step / self._interval_seconds
        )
        self._losses, self._norms, self._interval_seconds = [], [], 0.0
        return metrics


class MeanOverRanks:
    """The mean of a scalar over all processes; the scalar itself where there is one process."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def __call__(self, value: Tensor) -> Tensor:
        """Return the mean; every process must call this, in the same order."""
        if self._world_size == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total / self._world_size
