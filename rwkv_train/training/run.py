"""One pretraining run from settings to summary: corpus, weights, Trainer, picture."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from lightning.pytorch import Trainer

from rwkv_train.checkpoints.training_state import TrainingState, list_training_checkpoints
from rwkv_train.checkpoints.weights import read_weights
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.builtin import BUILTIN, ensure_builtin
from rwkv_train.data.module import PretrainData, n_slots
from rwkv_train.data.stored import Corpus, load_corpus
from rwkv_train.errors import ConfigError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import Tokenizer, TokenizerIdentity, load_tokenizer
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.keeper import CheckpointKeeper, restore_random_state
from rwkv_train.training.loggers import make_loggers
from rwkv_train.training.meter import Meter, StepMetrics
from rwkv_train.training.module import PretrainModule
from rwkv_train.training.plot import plot_run
from rwkv_train.training.progress import Display
from rwkv_train.training.resume import AUTO, find_resume_state
from rwkv_train.training.schedule import total_steps
from rwkv_train.training.strategy import device_of, make_trainer, process_rank
from rwkv_train.training.validation import Validation, Validator, metric_columns

logger = logging.getLogger(__name__)

LOG_FILE = "train.log"
LOCK_FILE = ".lock"


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

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as names and values for a table."""
        rows = [
            ("steps", f"{self.completed_steps:,} of {self.n_steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("training time", f"{self.train_seconds:,.0f} s"),
        ]
        if self.train_seconds > 0:
            rows.append(("speed", f"{self.tokens / self.train_seconds:,.0f} tokens/s"))
        if self.validation is not None:
            rows.append(("validation loss", f"{self.validation.loss:.4f} nats/token"))
            rows += [
                (f"bits per byte, {domain}", f"{totals.bits_per_byte:.4f}")
                for domain, totals in self.validation.totals.items()
                if totals.bytes
            ]
        rows += [("checkpoint", str(self.checkpoint or "none written")), ("plot", str(self.plot or "none"))]
        return rows


class Corpora(NamedTuple):
    """The data of a run, checked against its settings."""

    train: Corpus
    valid: Corpus | None
    tokenizer: Tokenizer


def run_pretraining(config: TrainConfig, resume: str = AUTO) -> RunSummary:
    """Train a model as the settings say, from scratch or from where an earlier process was stopped.

    Args:
        config: the settings of the run.
        resume: ``"auto"``, ``"none"`` or a path; see :func:`~rwkv_train.training.resume.find_resume_state`.

    Raises:
        ConfigError: settings contradict the data, the checkpoint or this machine.
        DataError: the corpus cannot be used.
        CheckpointError: weights or a checkpoint cannot be read or written.
        TrainingError: the gradient is no longer finite.
    """
    out_dir = config.trainer.run_folder
    _make_folder(out_dir)
    with _only_run_in(out_dir), _log_file(out_dir / LOG_FILE):
        return _run(config, resume, out_dir)


def open_corpora(config: TrainConfig) -> Corpora:
    """Open the token files of a run and check that they fit it.

    Raises:
        DataError: they are missing, damaged, too short, or of another tokenizer or vocabulary.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    train = _open_corpus(config, config.data.train, "train", tokenizer)
    train.require_length(config.model.ctx_len)
    valid = None
    if config.data.valid is not None:
        valid = _open_corpus(config, config.data.valid, "valid", tokenizer)
    return Corpora(train, valid, tokenizer)


def _open_corpus(config: TrainConfig, prefix: str, split: str, tokenizer: Tokenizer) -> Corpus:
    if prefix == BUILTIN:
        path = ensure_builtin(Path(config.data.cache_dir).expanduser(), tokenizer)[split]
    else:
        path = Path(prefix).expanduser()
    corpus = load_corpus(path)
    corpus.require_tokenizer(tokenizer.identity)
    corpus.require_vocab(config.model.vocab_size)
    return corpus


def _run(config: TrainConfig, resume: str, out_dir: Path) -> RunSummary:
    corpora = open_corpora(config)
    n_steps = total_steps(config.trainer, config.model.ctx_len, n_slots(corpora.train, config.model.ctx_len))
    state = find_resume_state(resume, config, corpora.tokenizer.identity, corpora.train)
    start_step = 0 if state is None else int(state.manifest["step"])
    if start_step > n_steps:
        raise ConfigError(
            f"the run is {n_steps} steps long but {start_step} are done; set trainer.max_steps (or max_tokens, "
            "max_epochs) higher, or choose another trainer.out_dir"
        )
    device = device_of(config.trainer)
    backend = choose_wkv_backend(config, device)
    logger.info("recurrence: %s", backend.reason)
    model = _make_model(config, backend.name, state, corpora.tokenizer.identity)
    seconds = 0.0 if state is None else float(state.manifest["train_seconds"])
    module = PretrainModule(model, config, n_steps, state)
    if state is not None:
        restore_random_state(state.manifest["random"])
    del state  # a second copy of the weights

    rank = process_rank()
    validator = None
    if corpora.valid is not None:
        validator = Validator(corpora.valid, corpora.tokenizer, config, rank, device)
    columns = ["tokens", "seconds", "learning_rate", *StepMetrics._fields]
    if validator is not None:
        columns += metric_columns(validator.domains)
    callback = RunCallback(
        Meter(config.trainer.global_batch_size * config.model.ctx_len, seconds),
        validator,
        CheckpointKeeper(config, corpora.tokenizer.identity, corpora.train, is_writer=rank == 0),
        Display(n_steps, start_step, is_shown=rank == 0),
    )
    loggers = make_loggers(config, columns, start_step) if rank == 0 else []
    trainer = make_trainer(config.trainer, n_steps - start_step, [callback], loggers)
    _announce(model, n_steps, start_step, config, trainer)
    if start_step == n_steps:
        logger.info("nothing to do: all %d steps are done", n_steps)
    else:
        _fit(trainer, module, PretrainData(corpora.train, config, start_step, n_steps))
    completed = start_step + trainer.global_step
    return RunSummary(
        out_dir=out_dir,
        n_steps=n_steps,
        completed_steps=completed,
        tokens=completed * config.trainer.global_batch_size * config.model.ctx_len,
        train_seconds=callback.meter.seconds,
        validation=None if validator is None else validator.last,
        checkpoint=callback.keeper.newest or next(reversed(list_training_checkpoints(out_dir)), None),
        plot=plot_run(out_dir) if rank == 0 else None,
        signal=callback.stop.received,
    )


def _make_model(
    config: TrainConfig, backend: str, state: TrainingState | None, tokenizer: TokenizerIdentity
) -> LanguageModel:
    model = build_model(config.model, wkv_backend=backend)
    if state is not None:
        model.load_state_dict(state.weights)
    elif config.model.init_from is not None:
        weights = read_weights(config.model.init_from)
        if weights.tokenizer is not None and not weights.tokenizer.matches(tokenizer):
            raise ConfigError(
                f"model.init_from ({config.model.init_from}) was trained with the tokenizer "
                f"'{weights.tokenizer.name}', the corpus was made with '{tokenizer.name}'; use the same one"
            )
        model.load_state_dict(weights.tensors)
        logger.info("starting from the weights of %s", config.model.init_from)
    else:
        initialize(model, config.trainer.seed)
    return model


def _fit(trainer: Trainer, module: PretrainModule, data: PretrainData) -> None:
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit as leaving:
        # Ctrl-C before the first step, which Lightning answers with exit code 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from leaving
        raise


def _announce(
    model: LanguageModel, n_steps: int, start_step: int, config: TrainConfig, trainer: Trainer
) -> None:
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "%s, %s parameters, steps %d to %d of %d samples x %d tokens, %s, %s",
        config.model.arch,
        f"{n_parameters:,}",
        start_step,
        n_steps,
        config.trainer.global_batch_size,
        config.model.ctx_len,
        config.trainer.precision,
        f"{trainer.world_size} x {trainer.strategy.root_device}",
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


@contextmanager
def _only_run_in(out_dir: Path) -> Iterator[None]:
    """Hold ``out_dir`` for this run; the other processes of the same run rely on the first one."""
    if process_rank() != 0:
        yield
        return
    lock = FileLock(out_dir / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"trainer.out_dir ({out_dir}) is in use by another run; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


class _LogFile(logging.FileHandler):
    """Where a line cannot be written, logging prints a traceback; a full disk gets its sentence elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append what the package logs to a file, at a finer level than the terminal shows."""
    if process_rank() != 0:
        yield
        return
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
