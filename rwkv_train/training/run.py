"""One run from settings to summary: data, weights, Trainer, picture."""

import gc
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer

from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.checkpoints.io import require_space
from rwkv_train.checkpoints.lock import hold_run_folder
from rwkv_train.checkpoints.run_folder import checkpoints_folder
from rwkv_train.checkpoints.training_state import TrainingCheckpoint, checkpoint_bytes
from rwkv_train.config.run import RunConfig
from rwkv_train.config.save import to_tree
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import Drawn, Position, RunData
from rwkv_train.errors import ConfigError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes, join_processes, naming_lost_processes
from rwkv_train.parallel.signals import StopSignal
from rwkv_train.parallel.watchdog import Watchdog
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.callbacks import RunCallback, drawn_metrics
from rwkv_train.training.code_version import code_version
from rwkv_train.training.early_stopping import EarlyStopping
from rwkv_train.training.guard import Guard, RollBack
from rwkv_train.training.keeper import CheckpointKeeper, restore_random_state
from rwkv_train.training.loggers import make_loggers
from rwkv_train.training.meter import Meter, StepMetrics
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.plot import plot_run
from rwkv_train.training.precision import prepare_forward
from rwkv_train.training.pretraining import PretrainingTask
from rwkv_train.training.progress import Display
from rwkv_train.training.resume import AUTO, find_checkpoint
from rwkv_train.training.schedule import RunLength
from rwkv_train.training.strategy import ENGINES, device_of, make_trainer
from rwkv_train.training.task import Task
from rwkv_train.training.validation import Validation

logger = logging.getLogger(__name__)

LOG_FILE = "train.log"


class RunSummary(NamedTuple):
    """What a run came to."""

    out_dir: Path
    n_steps: int
    """Steps of the whole run."""
    completed_steps: int
    """Steps that are done, over all resumptions."""
    tokens: int
    train_seconds: float
    """Time spent in training steps, over all resumptions."""
    validation: Validation | None
    checkpoint: Path | None
    plot: Path | None
    signal: int | None
    """Number of the signal that ended the run early."""
    drawn: tuple[Drawn, ...] = ()
    """What was taken from each of several corpora."""
    ended_early: str | None = None
    """Why the run is over before its last step; ``None``: it is not."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as names and values for a table."""
        rows = [
            ("steps", f"{self.completed_steps:,} of {self.n_steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            *((f"from {one.name}", f"{one.tokens:,} tokens, {one.epochs:.2f} epochs") for one in self.drawn),
            ("training time", f"{self.train_seconds:,.0f} s"),
        ]
        if self.ended_early is not None:
            rows.insert(1, ("ended early", self.ended_early))
        if self.train_seconds > 0:
            rows.append(("speed", f"{self.tokens / self.train_seconds:,.0f} tokens/s"))
        if self.validation is not None:
            of_step = (
                "" if self.validation.step == self.completed_steps else f" (step {self.validation.step})"
            )
            rows.append((f"validation loss{of_step}", f"{self.validation.loss:.4f} {self.validation.unit}"))
            rows += [
                ("bits per byte, " + (domain or "total"), f"{totals.bits_per_byte:.4f}")
                for domain, totals in self.validation.parts()
                if totals.bytes
            ]
        rows += [("checkpoint", str(self.checkpoint or "none written")), ("plot", str(self.plot or "none"))]
        return rows


def run_pretraining(
    config: TrainConfig, resume: str = AUTO, allow_change: Collection[str] = ()
) -> RunSummary:
    """Train a model as the settings say, from scratch or from where an earlier process was stopped.

    Where the settings ask for several processes, each of them calls this; what one refuses, all refuse.

    Args:
        config: the settings of the run.
        resume: ``"auto"``, ``"none"`` or a path; see :func:`~rwkv_train.training.resume.find_checkpoint`.
        allow_change: names of settings that may differ from those of the checkpoint.

    Raises:
        ConfigError: settings contradict the data, the checkpoint, this machine or another process.
        DataError: the corpus cannot be used.
        CheckpointError: weights or a checkpoint cannot be read or written.
        TrainingError: the gradient is no longer finite, or the loss leapt.
        LostProcessError: another process of the run ended or hangs.
    """
    return run_task(config, lambda: PretrainingTask(config), resume, allow_change)


def run_task(
    config: RunConfig, open_task: Callable[[], Task], resume: str, allow_change: Collection[str]
) -> RunSummary:
    """Train as the settings say; see :func:`run_pretraining`.

    Args:
        config: the settings of the run.
        open_task: opens its data. The first process of each machine comes first, as it may have to make some.
        resume: as in :func:`run_pretraining`.
        allow_change: as in :func:`run_pretraining`.
    """
    out_dir = config.trainer.run_folder
    device = device_of(config.trainer)
    backend = "gloo" if device.type == "cpu" else "nccl"
    needs_group = config.trainer.strategy != "auto"
    with (
        join_processes(config.trainer, backend=backend, always=needs_group) as processes,
        naming_lost_processes(processes),
        ExitStack() as held,
    ):
        with processes.failing_together():
            _make_folder(out_dir)
            if processes.is_first:
                held.enter_context(hold_run_folder(out_dir))
                held.enter_context(_log_file(out_dir / LOG_FILE))
        processes.require_same(
            {**to_tree(config), "code version": code_version(), "PyTorch": torch.__version__}
        )
        roll_back = None
        while True:
            try:
                return _run(config, open_task, resume, allow_change, processes, roll_back)
            except RollBack as bad:
                # Its traceback would keep model and optimizer alive beside those that are made next.
                roll_back = bad.with_traceback(None)
                is_own = bad.checkpoint.resolve().parent == checkpoints_folder(out_dir).resolve()
                resume = AUTO if is_own else str(bad.checkpoint)
            gc.collect()  # the Trainer, the module and their hooks refer to each other


def _run(
    config: RunConfig,
    open_task: Callable[[], Task],
    resume: str,
    allow_change: Collection[str],
    processes: Processes,
    roll_back: RollBack | None,
) -> RunSummary:
    out_dir = config.trainer.run_folder
    task = _open_in_turns(open_task, processes)
    processes.require_same({"data.train": task.source.identity, "data.valid": task.held_out})
    length = task.run_length()
    saved = find_checkpoint(
        resume, config, task.tokenizer.identity, task.source.identity, processes, allow_change
    )
    start = _position(config, saved, roll_back)
    device = device_of(config.trainer)
    watchdog = Watchdog(processes, config.trainer.hang_timeout_seconds)
    with processes.failing_together():
        require_length(length, start.step)
        task.go_to(start.first_sample(config), saved)
        guard = _make_guard(config, saved, roll_back)
        backend = choose_wkv_backend(config, device)
        model = task.make_model(backend.name, saved)
        if processes.is_first and start.step < length.n_steps:
            require_space(out_dir, checkpoint_bytes(config.model, task.learned))
    logger.info("recurrence: %s", backend.reason)
    prepare_forward(model, config.trainer)
    task.prepare(model, processes, watchdog.beat)
    engine = ENGINES[config.trainer.strategy](model, config, task.learned)
    module = TrainingModule(model, engine, config, length, start, guard, task.objective)
    with processes.failing_together():
        if saved is not None:
            restore_random_state(saved.manifest["random"])
        validator = task.make_validator(processes, watchdog.beat)
    early_stopping = _make_early_stopping(config, task, saved)
    columns = ["tokens", "seconds", "learning_rate", *StepMetrics.columns(), *task.objective.metrics]
    columns += drawn_metrics(task.source, 0)
    if validator is not None:
        columns += validator.columns
    callback = RunCallback(
        processes,
        Meter(length.tokens_per_step, 0.0 if saved is None else float(saved.manifest["train_seconds"])),
        validator,
        CheckpointKeeper(task, processes, saved, early_stopping, watchdog.beat),
        Display(length.n_steps, start.step, is_shown=processes.is_first),
        StopSignal(config.trainer.grace_seconds),
        watchdog,
    )
    with processes.failing_together():
        loggers = make_loggers(config, columns, start.step) if processes.is_first else []
        trainer = make_trainer(config, length.n_steps - start.step, [callback], loggers)
    _announce(model, task, length, start, trainer)
    if start.step == length.n_steps:
        logger.info("nothing to do: all %d steps are done", length.n_steps)
    elif early_stopping.reason is not None:
        logger.info("nothing to do: the run ended with step %d: %s", start.step, early_stopping.reason)
    else:
        _fit(trainer, module, RunData(lambda rank: task.batches(rank, start, length.n_steps)))
    completed = start.step + trainer.global_step
    return RunSummary(
        out_dir=out_dir,
        n_steps=length.n_steps,
        completed_steps=completed,
        tokens=completed * length.tokens_per_step,
        train_seconds=callback.meter.seconds,
        validation=None if validator is None else validator.last,
        checkpoint=callback.keeper.newest,
        plot=plot_run(out_dir, task.objective.unit) if processes.is_first else None,
        signal=callback.signal,
        drawn=task.source.drawn(start._replace(step=completed).first_sample(config)),
        ended_early=early_stopping.reason if completed < length.n_steps else None,
    )


def require_length(length: RunLength, step: int) -> None:
    """Refuse a run that is shorter than what is done of it.

    Raises:
        ConfigError: it is.
    """
    if step > length.n_steps:
        raise ConfigError(
            f"the run is {length.n_steps} steps long but {step} are done; set trainer.max_steps (or max_tokens, "
            "max_epochs) higher, or choose another trainer.out_dir"
        )


def _open_in_turns(open_task: Callable[[], Task], processes: Processes) -> Task:
    task = None
    for is_turn in (processes.local_rank == 0, processes.local_rank != 0):
        with processes.failing_together():
            if is_turn:
                task = open_task()
    assert task is not None
    return task


def _position(config: RunConfig, saved: TrainingCheckpoint | None, roll_back: RollBack | None) -> Position:
    if saved is None:
        return Position(0)
    start = Position(saved.manifest["step"], saved.manifest["data"].get("skipped", 0))
    if roll_back is not None:
        start = start._replace(skipped=start.skipped + roll_back.next_sample - start.first_sample(config))
    return start


def _make_guard(config: RunConfig, saved: TrainingCheckpoint | None, roll_back: RollBack | None) -> Guard:
    memory = {"losses": [], "bad_steps": []} if saved is None else saved.manifest.get("guard")
    if roll_back is not None:
        memory = {"losses": [], **(memory or {}), "bad_steps": roll_back.bad_steps}
    return Guard(config.guard, memory)


def _make_early_stopping(config: RunConfig, task: Task, saved: TrainingCheckpoint | None) -> EarlyStopping:
    memory = None if saved is None else saved.manifest.get("early_stopping")
    patience = config.trainer.early_stopping_patience
    return EarlyStopping(patience, task.held_out, memory, task.objective.unit)


def _fit(trainer: Trainer, module: TrainingModule, data: RunData) -> None:
    try:
        trainer.fit(module, datamodule=data)
        module.engine.release()
    except RollBack:
        module.engine.release()
        raise
    except SystemExit as leaving:
        # Ctrl-C before the first step, which Lightning answers with exit code 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from leaving
        raise


def _announce(model: LanguageModel, task: Task, length: RunLength, start: Position, trainer: Trainer) -> None:
    config = task.config
    # Not those of the model: quantized weights are no parameters.
    shapes = {**expected_shapes(config.model), **(task.learned or {})}
    n_parameters = sum(math.prod(shape) for shape in shapes.values())
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    settings = config.trainer
    logger.info(
        "%s, %s parameters%s, steps %d to %d of %d samples x %d tokens, %s, %s",
        config.model.arch,
        f"{n_parameters:,}",
        "" if n_trained > n_parameters / 2 else f" of which {n_trained:,} learn",
        start.step,
        length.n_steps,
        settings.global_batch_size,
        config.model.ctx_len,
        settings.precision,
        f"{trainer.world_size} x {trainer.strategy.root_device.type}, strategy {settings.strategy}",
    )


def _make_folder(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        usable = os.access(out_dir, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConfigError(
            f"trainer.out_dir ({out_dir}) cannot be made: {error.strerror or error}; choose another folder"
        ) from error
    if not usable:
        raise ConfigError(f"trainer.out_dir ({out_dir}) cannot be written to; choose another folder")


class _LogFile(logging.FileHandler):
    """Where a line cannot be written, logging prints a traceback; a full disk gets its sentence elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append what the package logs to a file, at a finer level than the terminal shows."""
    package = logging.getLogger("rwkv_train")
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    previous = package.level
    package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    logger.debug("process %d", os.getpid())
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(previous)
        handler.close()
