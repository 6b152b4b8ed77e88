"""Which step is bad, and how many of them a run puts up with. A bad step never changes the weights."""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rwkv_train.config.guard import GuardConfig
from rwkv_train.errors import CheckpointError

FEWEST_LOSSES = 10
"""Losses that a median is taken of at least; before, no loss counts as a spike."""


class RollBack(Exception):  # noqa: N818 - not an error: it takes a run back to its last checkpoint
    """A bad step, after which the run goes back to its last checkpoint and on with the data after that step.

    Args:
        checkpoint: folder of the checkpoint.
        next_sample: number of the first sample after the bad step.
        bad_steps: numbers of the bad steps so far, this one included.
    """

    def __init__(self, checkpoint: Path, next_sample: int, bad_steps: list[int]) -> None:
        super().__init__(f"going back to {checkpoint}, then on with sample {next_sample}")
        self.checkpoint = checkpoint
        self.next_sample = next_sample
        self.bad_steps = bad_steps


class Guard:
    """Judges each step by its loss and gradient; every process comes to the same judgement.

    Args:
        config: what counts as bad.
        saved: what :meth:`to_json` returned where the run goes on from.

    Raises:
        CheckpointError: ``saved`` is not that.
    """

    def __init__(self, config: GuardConfig, saved: Mapping[str, Any] | None = None) -> None:
        losses, bad_steps = _read(saved or {"losses": [], "bad_steps": []})
        self.watches_loss = config.loss_spike is not None
        """Whether :meth:`judge` needs the loss."""
        self._config = config
        self._losses = deque(losses, maxlen=config.window)
        self._bad_steps = bad_steps

    def judge(self, grad_norm: float, loss: float | None) -> str | None:
        """Say what is wrong with a step, or ``None``.

        Args:
            grad_norm: norm of the gradient over all processes.
            loss: mean loss over all processes, in nats per token; ``None`` where it is not watched.
        """
        if not math.isfinite(grad_norm):
            return f"the gradient is not finite (norm {grad_norm:g})"
        if loss is None or self._config.loss_spike is None:
            return None
        if not math.isfinite(loss):
            return f"the loss is not finite ({loss:g})"
        if len(self._losses) >= min(FEWEST_LOSSES, self._config.window):
            usual = median(self._losses)
            if loss > self._config.loss_spike * usual:
                return (
                    f"the loss is {loss:.4g}, more than {self._config.loss_spike:g} times the median "
                    f"of the last {len(self._losses)} steps ({usual:.4g})"
                )
        return None

    def note_good(self, loss: float | None) -> None:
        """Note the loss of a step in which nothing was wrong."""
        if loss is not None:
            self._losses.append(loss)

    def note_bad(self, step: int, checkpoint_step: int | None = None) -> bool:
        """Note that a step was bad; tell whether the run may go on.

        Args:
            step: its number.
            checkpoint_step: step of the checkpoint that the run would go back to: all bad steps since then count,
                however many steps lie between them, or it might go back to it for ever.
        """
        oldest = step - self._config.window
        if checkpoint_step is not None and self._config.action == "rollback":
            oldest = min(oldest, checkpoint_step)
        self._bad_steps = [bad for bad in self._bad_steps if bad > oldest] + [step]
        return self._config.action != "stop" and len(self._bad_steps) <= self._config.max_bad_steps

    @property
    def bad_steps(self) -> list[int]:
        """Numbers of the bad steps that count."""
        return list(self._bad_steps)

    def to_json(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge alike."""
        return {"losses": list(self._losses), "bad_steps": self._bad_steps}


def _read(saved: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    losses, bad_steps = saved.get("losses"), saved.get("bad_steps")
    if (
        not isinstance(losses, list)
        or not isinstance(bad_steps, list)
        or not all(isinstance(loss, float) for loss in losses)
        or not all(isinstance(step, int) for step in bad_steps)
    ):
        raise CheckpointError("the section 'guard' of a manifest.json does not hold losses and bad_steps")
    return losses, bad_steps
