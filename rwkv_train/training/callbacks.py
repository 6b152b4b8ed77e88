"""What happens around an optimizer step, in one place and one order."""

import logging
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.core import LightningModule

from rwkv_train.config.guard import GuardConfig
from rwkv_train.data.module import DataSource
from rwkv_train.errors import TrainingError
from rwkv_train.parallel.processes import Processes
from rwkv_train.parallel.signals import StopSignal
from rwkv_train.parallel.watchdog import Watchdog
from rwkv_train.training.diagnosis import where_it_went_wrong
from rwkv_train.training.guard import RollBack
from rwkv_train.training.keeper import CheckpointKeeper
from rwkv_train.training.loggers import log_answers
from rwkv_train.training.meter import Meter
from rwkv_train.training.module import StepResult, TrainingModule
from rwkv_train.training.objective import lanes_of
from rwkv_train.training.progress import Display
from rwkv_train.training.validation import Answer, Validation, Validator

logger = logging.getLogger(__name__)


class RunCallback(Callback):
    """Measures, validates, logs, saves and stops: each when it is due, in this order.

    Args:
        processes: the processes of the run.
        meter: loss, gradient and speed between two log rows.
        validator: the held-out loss; ``None`` without validation data.
        keeper: writes and prunes checkpoints.
        display: the progress bar.
        stop: signals to stop.
        watchdog: ends the run where it hangs.
    """

    def __init__(
        self,
        processes: Processes,
        meter: Meter,
        validator: Validator | None,
        keeper: CheckpointKeeper,
        display: Display,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        self.processes = processes
        self.meter = meter
        self.validator = validator
        self.keeper = keeper
        self.display = display
        self.stop = stop
        self.watchdog = watchdog
        self.signal: int | None = None
        """Number of the signal that ended the run early, on whichever process it came."""
        self._seen_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the engine to what the strategy has placed, and restore what the run goes on from."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.engine.bind(trainer)
        with self.processes.failing_together():
            resumed = self.keeper.resumed
            if resumed is not None:
                pl_module.engine.restore(resumed)
                # After a bad step the run goes on with later data, where its lanes are in other conversations.
                if pl_module.start.skipped == resumed.manifest["data"].get("skipped", 0):
                    lanes = lanes_of(pl_module.config.trainer, trainer.global_rank)
                    pl_module.objective.restore(resumed.carried(), lanes)
        if pl_module.config.trainer.compile:
            logger.info("the first steps take long: they compile the blocks (trainer.compile)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, once Lightning has set its own handlers, and the terminal; score a new run."""
        self.stop.listen()
        self.display.open()
        self.watchdog.start()
        assert isinstance(pl_module, TrainingModule)
        if self.validator is not None and pl_module.start.step == 0:
            validation = self._validate(self.validator, pl_module, 0)
            self.keeper.early_stopping.note(validation.loss)
            self._log(trainer, validation.as_metrics(), 0, validation.answers)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.watchdog.beat()
        self.meter.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; do what is due if this micro-batch ended a step."""
        self.watchdog.beat()
        self.meter.pause()
        if trainer.global_step > self._seen_steps:
            self._seen_steps = trainer.global_step
            assert isinstance(pl_module, TrainingModule)
            self._after_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the signals and the terminal."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the signals and the terminal."""
        self._release()

    def _after_step(self, trainer: Trainer, module: TrainingModule) -> None:
        step = module.completed_steps
        is_last = step == module.length.n_steps
        result = module.finish_step()
        if result.problem is not None:
            self._answer(module, step, result.problem)
        row = self._report(module, step, result, is_last)
        validation: Validation | None = None
        if self.validator is not None and (is_last or step % module.config.trainer.val_every_n_steps == 0):
            validation = self._validate(self.validator, module, step)
            row |= validation.as_metrics()
            self.keeper.early_stopping.note(validation.loss)
        if row:
            self._log(trainer, row, step, () if validation is None else validation.answers)

        # One small exchange a step: signals and clocks differ between processes, decisions must not.
        wants_stop, is_time = self.processes.any_of(self.stop.is_set, self.keeper.is_time())
        is_best = validation is not None and self.keeper.is_best(validation)
        ends_early = self.keeper.early_stopping.reason
        if is_last or ends_early or is_best or wants_stop or is_time or self.keeper.is_due(step):
            self.watchdog.beat()
            self.keeper.save(module, self.meter.seconds, validation)
        if wants_stop:
            # Perhaps it came to some of the processes only; all leave with its exit code.
            received = self.processes.gather(self.stop.received)
            self.signal = next(number for number in received if number is not None)
        if ends_early and not is_last:
            logger.info("ending after step %d of %d: %s", step, module.length.n_steps, ends_early)
            trainer.should_stop = True
        elif wants_stop and not is_last:
            n_steps = module.length.n_steps
            logger.info("stopping after step %d of %d; the same command goes on from here", step, n_steps)
            trainer.should_stop = True

    def _report(
        self, module: TrainingModule, step: int, result: StepResult, is_last: bool
    ) -> dict[str, float]:
        """Show the step; return the metrics of the steps since the last row if one is due."""
        settings = module.config.trainer
        if result.problem is None:  # the means are over steps that were taken
            self.meter.add(result.loss, result.grad_norm, result.metrics)
        self.display.advance(step)
        if not self.meter.has_steps or not (is_last or step % settings.log_every_n_steps == 0):
            return {}
        metrics = self.meter.read(settings.world_size)
        rate = module.learning_rate_of(step - 1)
        self.display.report(step, metrics, rate)
        return {
            "tokens": step * module.length.tokens_per_step,
            "seconds": round(self.meter.seconds, 3),
            "learning_rate": rate,
            **metrics.as_row(),
            **drawn_metrics(self.keeper.source, module.start._replace(step=step).first_sample(module.config)),
        }

    def _validate(self, validator: Validator, module: TrainingModule, step: int) -> Validation:
        with module.forward_context():
            validation = validator.run(module.model, step)
        module.engine.rest()
        return validation

    def _answer(self, module: TrainingModule, step: int, problem: str) -> None:
        """Do about a bad step, which changed nothing, what the settings say.

        Raises:
            TrainingError: the run must not go on.
            RollBack: it goes back.
        """
        guard: GuardConfig = module.config.guard
        may_go_on = module.guard.note_bad(step, self.keeper.newest_step)
        place = where_it_went_wrong(module, self.processes)
        if not may_go_on:
            bad = module.guard.bad_steps
            bound = (
                f" (bad step {len(bad)} from step {bad[0]} on, guard.max_bad_steps is {guard.max_bad_steps})"
            )
            others = "" if guard.action != "stop" else "set guard.action to 'skip' or 'rollback', or "
            error = TrainingError(
                f"step {step}: {problem}; {place}{'' if guard.action == 'stop' else bound}; nothing was saved over "
                f"the last checkpoint; {others}start a new run (another trainer.out_dir) with a lower optim.lr or "
                "optim.beta2, from the last checkpoint's weights (model.init_from)"
            )
            error.is_reported_elsewhere = not self.processes.is_first  # all come here together
            raise error
        if guard.action == "skip":
            logger.warning("step %d: %s; %s; its batch is skipped", step, problem, place)
            return
        goal = self.keeper.newest
        if goal is None:
            logger.warning(
                "step %d: %s; %s; its batch is skipped, as there is no checkpoint yet", step, problem, place
            )
            return
        logger.warning("step %d: %s; %s; going back to %s", step, problem, place, goal.name)
        next_sample = module.start._replace(step=step).first_sample(module.config)
        raise RollBack(goal, next_sample, module.guard.bad_steps)

    def _release(self) -> None:
        self.watchdog.stop()
        self.stop.ignore()
        self.display.close()

    def _log(
        self, trainer: Trainer, row: dict[str, float], step: int, answers: tuple[Answer, ...] = ()
    ) -> None:
        with self.processes.failing_together():
            for run_logger in trainer.loggers:  # the first process has them
                run_logger.log_metrics(row, step=step)
            log_answers(trainer.loggers, answers, step)


def drawn_metrics(source: DataSource, n_samples: int) -> dict[str, float]:
    """Return what the first ``n_samples`` of a run took from each of several corpora, as columns of a metrics row."""
    row: dict[str, float] = {}
    for part in source.drawn(n_samples):
        row |= {f"tokens/{part.name}": part.tokens, f"epochs/{part.name}": part.epochs}
    return row
