"""The LightningModule: it joins the model, the loss and the optimizer and does nothing else."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rwkv_train.config.run import RunConfig
from rwkv_train.data.module import MicroBatch, Position
from rwkv_train.models.lm import LanguageModel
from rwkv_train.training.engine import Engine
from rwkv_train.training.guard import Guard
from rwkv_train.training.meter import mean_over_ranks
from rwkv_train.training.objective import Objective
from rwkv_train.training.precision import autocast_of
from rwkv_train.training.schedule import RunLength, learning_rate, weight_decay


class StepResult(NamedTuple):
    """What one optimizer step came to."""

    loss: Tensor
    """Share of this process in the mean loss: its mean over the processes is that, in the objective's unit."""
    grad_norm: Tensor
    """Norm of the gradient over all processes, before clipping."""
    problem: str | None
    """What was wrong, so that the weights are still those of the step before; ``None`` if nothing was."""
    metrics: Mapping[str, Tensor] = {}
    """Shares of this process in the objective's other metrics, by name."""


class TrainingModule(LightningModule):
    """Training of a language model, from a position in the data on.

    Args:
        model: the model, with the weights to start from.
        engine: how the strategy holds its parameters.
        config: the settings of the run.
        length: length of the whole run.
        start: where the run stands.
        guard: tells bad steps.
        objective: the loss.
    """

    def __init__(
        self,
        model: LanguageModel,
        engine: Engine,
        config: RunConfig,
        length: RunLength,
        start: Position,
        guard: Guard,
        objective: Objective,
    ) -> None:
        super().__init__()
        self.model = model
        self.engine = engine
        self.config = config
        self.length = length
        self.start = start
        self.guard = guard
        self.objective = objective
        self.last_batch: MicroBatch | None = None
        self._sum = torch.zeros(())  # losses of the micro-batches since the last step
        self._sums: dict[str, Tensor] = {}  # the other metrics
        self._grad_norm: Tensor | None = None
        self._problem: str | None = None
        self._watched_loss: float | None = None
        self._ends_step = False

    @property
    def completed_steps(self) -> int:
        """Optimizer steps since the very start of the run, over all resumptions."""
        return self.start.step + self.trainer.global_step

    def learning_rate_of(self, step: int) -> float:
        """Return the learning rate of a step, from 0, for parameters whose factor is 1."""
        return learning_rate(step, self.length, self.config.optim)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of precision in which the model computes, in training and in validation."""
        return autocast_of(self.config.trainer.precision, self.device)

    def configure_model(self) -> None:
        """Let the engine spread the parameters; Lightning calls this once its processes stand."""
        self.engine.shard(self.trainer)

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer here, not in ``__init__``: by now the strategy has placed the parameters."""
        return self.engine.make_optimizer()

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        """Set learning rate and weight decay, which depend on the number of the step alone."""
        optim = self.config.optim
        rate = self.learning_rate_of(self.completed_steps)
        decay = weight_decay(self.completed_steps, self.length, optim)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["lr_factor"]
            group["weight_decay"] = decay if group["has_weight_decay"] else 0.0

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Return the share of one micro-batch in the step's loss.

        The loss of a step is the sum over its valid targets divided by their number over all processes and
        accumulated micro-batches. Strategies average over processes and micro-batches, which is undone here.
        """
        settings = self.config.trainer
        self.last_batch = batch
        self._ends_step = (batch_idx + 1) % settings.accumulation == 0
        # Dropout is a function of the sample, so a resumed run draws the same masks.
        torch.manual_seed((settings.seed * 1_000_003 + batch.first_sample) % (1 << 63))
        with self.forward_context():
            losses = self.objective(self.model, batch, self.config.optim.l2wrap)
        self._sum = self._sum.to(losses.loss.device) + losses.loss
        for name, value in losses.metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return losses.total * (settings.world_size * settings.accumulation / batch.step_targets)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient; leave out the step where the guard finds something wrong."""
        if not self._ends_step:
            return  # DeepSpeed comes here with every micro-batch
        self._grad_norm = self.engine.clip()
        if self.guard.watches_loss:
            self._watched_loss = float(mean_over_ranks(self._loss(), self._world_size))
        norm = 0.0 if self._grad_norm is None else float(self._grad_norm)
        self._problem = self.guard.judge(norm, self._watched_loss)
        self.engine.skip_step(self._problem is not None)

    def finish_step(self) -> StepResult:
        """Return what the step just taken came to, and start the sums anew."""
        norm = self._grad_norm
        if norm is None:
            norm = self.engine.step_norm()
            assert norm is not None
            self._problem = self._problem or self.guard.judge(float(norm), None)
        if self._problem is None:
            self.guard.note_good(self._watched_loss)
        else:
            self.objective.forget()
        metrics = {name: self._share(value) for name, value in self._sums.items()}
        result = StepResult(self._loss(), norm, self._problem, metrics)
        self._sum, self._sums = torch.zeros_like(self._sum), {}
        return result

    @property
    def _world_size(self) -> int:
        return self.config.trainer.world_size

    def _loss(self) -> Tensor:
        return self._share(self._sum)

    def _share(self, total: Tensor) -> Tensor:
        assert self.last_batch is not None
        return total * (self._world_size / self.last_batch.step_targets)
