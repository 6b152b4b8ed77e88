"""Which checkpoints a run writes, which it keeps, and what is in them."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json
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
from rwkv_train.errors import CheckpointError
from rwkv_train.parallel.processes import Processes
from rwkv_train.training.early_stopping import EarlyStopping
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.task import Task
from rwkv_train.training.validation import Validation

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Writes checkpoints at an interval and keeps the newest few, the best one and milestones.

    Args:
        task: what the run learns; its settings are saved with each checkpoint.
        processes: the processes of the run; the first one writes what all of them hold.
        resumed: the checkpoint that the run goes on from; ``None`` from scratch.
        early_stopping: counts validations; saved with each checkpoint.
        beat: called for each parameter of a save, as a sign of progress.
    """

    def __init__(
        self,
        task: Task,
        processes: Processes,
        resumed: TrainingCheckpoint | None,
        early_stopping: EarlyStopping,
        beat: Callable[[], None],
    ) -> None:
        self._task = task
        self._config = config = task.config
        self.early_stopping = early_stopping
        """Counts the validations that found the run no better."""
        self.source = task.source
        """The training data."""
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

    def save(self, module: TrainingModule, seconds: float, validation: Validation | None) -> None:
        """Write a checkpoint, then remove those that are no longer kept. All processes call this together.

        Args:
            module: holds the model and the step.
            seconds: time spent in training steps since the very start of the run.
            validation: the result at this very step; ``None`` where it was not measured.

        Raises:
            CheckpointError: it cannot be written; on all processes.
        """
        started = time.monotonic()
        manifest, stream = self._manifest(module, seconds, validation)
        carried = {
            name: tensor
            for part in self._processes.gather(module.objective.carried())
            for name, tensor in part.items()
        }
        parameters = self._with_beats(module.engine.read())
        with self._processes.failing_together():
            try:
                if self._processes.is_first:
                    self._write(manifest, parameters, stream, carried, validation)
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
        self,
        manifest: Json,
        parameters: Iterator[ParameterState],
        stream: Mapping[str, Tensor],
        carried: Mapping[str, Tensor],
        validation: Validation | None,
    ) -> None:
        settings = self._config.checkpoint
        learned: dict[str, Tensor] = {}
        if self._task.learned is not None:
            parameters = _noting(parameters, learned)
        self.newest = save_training_checkpoint(
            self._out_dir,
            manifest,
            parameters,
            max_file_bytes=settings.max_file_bytes,
            stream=stream,
            carried=carried,
            add_files=lambda folder: self._task.add_files(folder, learned, manifest["step"]),
        )
        logger.debug("wrote %s", self.newest)
        if validation is not None and self.is_best(validation):
            self._best = BestCheckpoint(self.newest.name, manifest["step"], validation.loss)
            write_best(self._out_dir, self._best)
        prune_training_checkpoints(
            self._out_dir, settings.keep_last, keep_every_n_steps=settings.keep_every_n_steps
        )

    def _manifest(
        self, module: TrainingModule, seconds: float, validation: Validation | None
    ) -> tuple[Json, Mapping[str, Tensor]]:
        """Return the manifest, and the tensors that go beside what it says of a stream."""
        step = module.completed_steps
        position = module.start._replace(step=step)
        n_samples = position.first_sample(self._config)
        sections, stream = self._task.manifest(n_samples)
        data = {
            "samples": n_samples,
            "skipped": position.skipped,
            "train": self.source.identity,
            "drawn": [part._asdict() for part in self.source.drawn(n_samples)],
        }
        return {
            "step": step,
            "tokens": step * module.length.tokens_per_step,
            "config": to_tree(self._config),
            "arch_config": to_tree(make_explicit(self._config.model)),
            "tokenizer": self._task.tokenizer.identity._asdict(),
            "random": random_state(),
            "updates": module.engine.n_updates,
            "guard": module.guard.to_json(),
            "early_stopping": self.early_stopping.to_json(),
            "train_seconds": seconds,
            "validation": None if validation is None else validation.to_json(),
            **sections,
            "data": data | sections.get("data", {}),
        }, stream


def _noting(parameters: Iterator[ParameterState], weights: dict[str, Tensor]) -> Iterator[ParameterState]:
    """Pass parameters on, and keep their weights on the CPU."""
    for parameter in parameters:
        weights[parameter.name] = parameter.weight.detach().to("cpu", torch.float32)
        yield parameter


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
