"""What happens around an optimizer step, in one place and one order."""

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.core import LightningModule

from rwkv_train.training.keeper import CheckpointKeeper
from rwkv_train.training.meter import Meter
from rwkv_train.training.module import PretrainModule
from rwkv_train.training.progress import Display
from rwkv_train.training.schedule import learning_rate_factor
from rwkv_train.training.validation import Validation, Validator

logger = logging.getLogger(__name__)


class RunCallback(Callback):
    """Measures, validates, logs, saves and stops: each when it is due, in this order.

    Args:
        meter: loss, gradient and speed between two log rows.
        validator: the held-out loss; ``None`` without validation data.
        keeper: writes and prunes checkpoints.
        display: the progress bar.
    """

    def __init__(
        self, meter: Meter, validator: Validator | None, keeper: CheckpointKeeper, display: Display
    ) -> None:
        self.meter = meter
        self.validator = validator
        self.keeper = keeper
        self.display = display
        self.stop = StopSignal()
        self._seen_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, once Lightning has set its own handlers, and the terminal; score a new run."""
        self.stop.listen()
        self.display.open()
        assert isinstance(pl_module, PretrainModule)
        if self.validator is not None and pl_module.start_step == 0:
            _log(trainer, self.validator.run(pl_module.model, 0).as_metrics(), 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.meter.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; do what is due if this micro-batch ended a step."""
        self.meter.pause()
        if trainer.global_step > self._seen_steps:
            self._seen_steps = trainer.global_step
            assert isinstance(pl_module, PretrainModule)
            self._after_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the signals and the terminal."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the signals and the terminal."""
        self._release()

    def _after_step(self, trainer: Trainer, module: PretrainModule) -> None:
        settings = module.config.trainer
        step = module.completed_steps
        is_last = step == module.n_steps
        self.meter.add(module.loss_sum / settings.accumulation, module.grad_norm)
        module.loss_sum = torch.zeros_like(module.loss_sum)
        self.display.advance(step)

        row: dict[str, float] = {}
        if is_last or step % settings.log_every_n_steps == 0:
            metrics = self.meter.read(settings.world_size)
            optim = module.config.optim
            # Lightning has set the next step's rate already.
            learning_rate = optim.lr * learning_rate_factor(step - 1, module.n_steps, optim)
            self.display.report(step, metrics, learning_rate)
            row |= {
                "tokens": step * settings.global_batch_size * module.config.model.ctx_len,
                "seconds": round(self.meter.seconds, 3),
                "learning_rate": learning_rate,
                **metrics._asdict(),
            }
        validation: Validation | None = None
        if self.validator is not None and (is_last or step % settings.val_every_n_steps == 0):
            validation = self.validator.run(module.model, step)
            row |= validation.as_metrics()
        if row:
            _log(trainer, row, step)

        wants_stop = trainer.strategy.reduce_boolean_decision(self.stop.is_set, all=False)
        is_best = validation is not None and self.keeper.is_best(validation)
        if is_last or is_best or wants_stop or self.keeper.is_due(step):
            self.keeper.save(module, trainer.optimizers[0], self.meter.seconds, validation)
        if wants_stop and not is_last:
            logger.info(
                "stopping after step %d of %d; the same command goes on from here", step, module.n_steps
            )
            trainer.should_stop = True

    def _release(self) -> None:
        self.stop.ignore()
        self.display.close()


def _log(trainer: Trainer, row: dict[str, float], step: int) -> None:
    for run_logger in trainer.loggers:
        run_logger.log_metrics(row, step=step)


class StopSignal:
    """Ctrl-C and SIGTERM, noted now and acted on at the end of the step. A second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def listen(self) -> None:
        """Take over the signals."""
        for name in self.SIGNALS:
            self._previous[name] = signal.signal(name, self._note)

    def ignore(self) -> None:
        """Give the signals back to whoever had them."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        logger.info("%s: saving after this step; once more stops at once", self.received.name)
        signal.signal(number, signal.SIG_DFL)
