"""What a run reports of itself between two log rows: loss, gradient, speed."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class StepMetrics(NamedTuple):
    """Means over the steps since the last row."""

    loss: float
    """In the unit of the objective: nats per token."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    tokens_per_second: float
    """Tokens of all devices, per second spent in training steps."""
    others: Mapping[str, float] = {}
    """What else the objective reports."""

    def as_row(self) -> dict[str, float]:
        """Return the metrics as columns of a row."""
        own = {name: getattr(self, name) for name in self.columns()}
        return {**own, **self.others}

    @classmethod
    def columns(cls) -> list[str]:
        """Return the names of the columns that every objective has."""
        return [name for name in cls._fields if name != "others"]


class Meter:
    """Collects steps; reads them off the device only when a row is due: measuring lets training wait for nothing."""

    def __init__(self, tokens_per_step: int, seconds: float = 0.0) -> None:
        self.seconds = seconds
        """Time spent in training steps since the very start of the run, in seconds."""
        self._tokens_per_step = tokens_per_step
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._others: list[Mapping[str, Tensor]] = []
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

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._losses)

    def add(self, loss: Tensor, grad_norm: Tensor, others: Mapping[str, Tensor]) -> None:
        """Note one finished optimizer step; all are scalars on the device."""
        self._losses.append(loss.detach())
        self._norms.append(grad_norm.detach())
        self._others.append(others)

    def read(self, world_size: int) -> StepMetrics:
        """Return the means since the last call and start anew; all ``world_size`` processes call it together."""
        n_steps = len(self._losses)
        loss = mean_over_ranks(torch.stack(self._losses).mean(), world_size)
        norm = torch.stack(self._norms).mean()  # of the gradient that all processes share
        others = {
            name: float(
                mean_over_ranks(torch.stack([step[name] for step in self._others]).mean(), world_size)
            )
            for name in self._others[0]
        }
        speed = n_steps * self._tokens_per_step / self._interval_seconds
        metrics = StepMetrics(float(loss), float(norm), speed, others)
        self._losses, self._norms, self._others, self._interval_seconds = [], [], [], 0.0
        return metrics


def mean_over_ranks(value: Tensor, world_size: int) -> Tensor:
    """Return the mean of a scalar over all processes; each of them must call this, in the same order."""
    if world_size == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / world_size
