"""Which checkpoints a run writes, which it keeps, and what is in them."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.manifest import decode_random_state, encode_random_state, read_manifest
from rwkv_train.checkpoints.retention import (
    BestCheckpoint,
    prune_training_checkpoints,
    read_best,
    write_best,
)
from rwkv_train.checkpoints.run_folder import list_training_checkpoints
from rwkv_train.checkpoints.training_state import (
    ParameterState,
    TrainingCheckpoint,
    save_training_checkpoint,
)
from rwkv_train.config.save import to_tree
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import Samples
from rwkv_train.data.streaming import StreamSamples
from rwkv_train.errors import CheckpointError
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import TokenizerIdentity
from rwkv_train.training.early_stopping import EarlyStopping
from rwkv_train.training.module import PretrainModule
from rwkv_train.training.validation import Validation

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Writes checkpoints at an interval and keeps the newest few, the best one and milestones.

    Args:
        config: the settings of the run, saved with each checkpoint.
        tokenizer: identity of the corpus' tokenizer.
        samples: the training samples.
        processes: the processes of the run; the first one writes what all of them hold.
        resumed: the checkpoint that the run goes on from; ``None`` from scratch.
        early_stopping: counts validations; saved with each checkpoint.
        beat: called for each parameter of a save, as a sign of progress.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: TokenizerIdentity,
        samples: Samples,
        processes: Processes,
        resumed: TrainingCheckpoint | None,
        early_stopping: EarlyStopping,
        beat: Callable[[], None],
    ) -> None:
        self._config = config
        self.samples = samples
        """The training samples."""
        self.early_stopping = early_stopping
        """Counts the validations that found the run no better."""
        self._tokenizer = tokenizer
        self._processes = processes
        self._beat = beat
        self._out_dir = config.trainer.run_folder
        with processes.failing_together():
            best = self._find_best() if processes.is_first else None
        self._best = processes.broadcast(best)
        self._saved_at = time.monotonic()
        self.resumed = resumed
        """The checkpoint that the run goes on from."""
        self.newest: Path | None = None if resumed is None else resumed.folder
        """The checkpoint that the run would go back to."""
        self.newest_step: int | None = None if resumed is None else resumed.manifest["step"]
        """Its step."""
        self.save_seconds = 0.0
        """Time that training has waited for saves."""

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint follows this step."""
        every = self._config.checkpoint.keep_every_n_steps
        return step % self._config.checkpoint.every_n_steps == 0 or (every is not None and step % every == 0)

    def is_time(self) -> bool:
        """Return whether a checkpoint is due by the clock of this process."""
        minutes = self._config.checkpoint.every_n_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def is_best(self, validation: Validation) -> bool:
        """Return whether a validation is better than that of every checkpoint so far."""
        return self._best is None or validation.loss < self._best.loss

    def save(self, module: PretrainModule, seconds: float, validation: Validation | None) -> None:
        """Write a checkpoint, then remove those that are no longer kept. All processes call this together.

        Args:
            module: holds the model and the step.
            seconds: time spent in training steps since the very start of the run.
            validation: the result at this very step; ``None`` where it was not measured.

        Raises:
            CheckpointError: it cannot be written; on all processes.
        """
        started = time.monotonic()
        manifest = self._manifest(module, seconds, validation)
        parameters = self._with_beats(module.engine.read())
        with self._processes.failing_together():
            try:
                if self._processes.is_first:
                    self._write(manifest, parameters, validation)
            finally:
                # Gathering takes all processes: each goes to the end, also where the first one could not write.
                for _ in parameters:
                    pass
        self.newest = self._processes.broadcast(self.newest)
        self.newest_step = module.completed_steps
        self._best = self._processes.broadcast(self._best)
        self._saved_at = time.monotonic()
        self.save_seconds += self._saved_at - started

    def _find_best(self) -> BestCheckpoint | None:
        """Return the best checkpoint so far; none where its loss is on other text than the losses to come."""
        best = read_best(self._out_dir)
        for folder in list_training_checkpoints(self._out_dir):
            if best is not None and folder.name == best.checkpoint:
                memory = read_manifest(folder).get("early_stopping")
                return best if self.early_stopping.is_on_same_text(memory) else None
        return best

    def _with_beats(self, parameters: Iterator[ParameterState]) -> Iterator[ParameterState]:
        for parameter in parameters:
            self._beat()
            yield parameter

    def _write(
        self, manifest: dict[str, Any], parameters: Iterator[ParameterState], validation: Validation | None
    ) -> None:
        settings = self._config.checkpoint
        stream = None
        if isinstance(self.samples, StreamSamples):
            state = self.samples.state_at(manifest["data"]["samples"])
            manifest["data"]["stream"], stream = state.to_json(), state.to_tensors()
        self.newest = save_training_checkpoint(
            self._out_dir, manifest, parameters, max_file_bytes=settings.max_file_bytes, stream=stream
        )
        logger.debug("wrote %s", self.newest)
        if validation is not None and self.is_best(validation):
            self._best = BestCheckpoint(self.newest.name, manifest["step"], validation.loss)
            write_best(self._out_dir, self._best)
        prune_training_checkpoints(
            self._out_dir, settings.keep_last, keep_every_n_steps=settings.keep_every_n_steps
        )

    def _manifest(
        self, module: PretrainModule, seconds: float, validation: Validation | None
    ) -> dict[str, Any]:
        step = module.completed_steps
        position = module.start._replace(step=step)
        n_samples = position.first_sample(self._config)
        return {
            "step": step,
            "tokens": step * module.length.tokens_per_step,
            "config": to_tree(self._config),
            "arch_config": to_tree(make_explicit(self._config.model)),
            "tokenizer": self._tokenizer._asdict(),
            "data": {
                "samples": n_samples,
                "skipped": position.skipped,
                "train": self.samples.identity,
                "drawn": [part._asdict() for part in self.samples.drawn(n_samples)],
            },
            "random": random_state(),
            "updates": module.engine.n_updates,
            "guard": module.guard.to_json(),
            "early_stopping": self.early_stopping.to_json(),
            "train_seconds": seconds,
            "validation": None if validation is None else validation.to_json(),
        }


def random_state() -> dict[str, str]:
    """Return the states of torch's random generators, by device, as text."""
    states = {"cpu": torch.get_rng_state()}
    # Not is_available: reading the state would start CUDA, in a run on the CPU too.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: encode_random_state(state) for device, state in states.items()}


def restore_random_state(saved: dict[str, str]) -> None:
    """Put torch's random generators where :func:`random_state` found them."""
    try:
        torch.set_rng_state(decode_random_state(saved["cpu"]))
        if "cuda" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(decode_random_state(saved["cuda"]))
    except RuntimeError as error:
        raise CheckpointError(f"the random state of a manifest.json is not PyTorch's: {error}") from error
