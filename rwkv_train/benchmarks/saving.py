"""What a checkpoint costs: how long training stands still for it, and how long it takes to come back."""

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.benchmarks.strategies import ALL
from rwkv_train.benchmarks.trial import Json, TimedCallback, main, now, run_trial, settings_of_trial
from rwkv_train.checkpoints.training_state import TrainingCheckpoint, open_training_checkpoint
from rwkv_train.config.model import ModelConfig, Rwkv7Config
from rwkv_train.config.train import TrainConfig
from rwkv_train.models.registry import build_model, count_parameters
from rwkv_train.parallel.processes import Processes
from rwkv_train.training.early_stopping import EarlyStopping
from rwkv_train.training.keeper import CheckpointKeeper
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.pretraining import PretrainingTask
from rwkv_train.training.validation import Validation

N_WARM_UP = 1
"""Saves that are not counted: the first one has nothing to remove afterwards."""


STANDARD = Rwkv7Config(n_layer=12, n_embd=576, vocab_size=257, ctx_len=32)
"""About 51 million parameters: a checkpoint of 0.6 GB."""


def bench_saving(
    config: ModelConfig = STANDARD,
    *,
    strategies: Sequence[str] = ALL,
    n_processes: int = 2,
    accelerator: str = "cpu",
    repeats: int = 5,
    folder: Path | None = None,
) -> Iterator[Json]:
    """Measure saves and the way back, each row in processes of its own.

    A checkpoint follows every step of a short run, as ``pretrain`` writes it; training waits for it to its end, so
    the time of a save is the time that training stands still. The files that are read back are in the system's
    cache, as they are after a crash of the program but not of the machine.

    Args:
        config: the model.
        strategies: names of ``trainer.strategy``.
        n_processes: processes under each of them but "auto", which is one; "gpu" needs as many GPUs.
        accelerator: ``"cpu"`` or ``"gpu"``.
        repeats: saves, and ways back, that are measured; the median counts.
        folder: where the checkpoints are written and removed again; a temporary one unless given.

    Yields:
        One row for each strategy: ``gb`` of a checkpoint (10^9 bytes); ``write_s``, for as many bytes written and
        flushed at once, what the disk needs at least; ``save_s`` and ``save_gb_per_s``; ``verify_s``, to compare
        every file with its hash; ``weights_s``, to read the weights into a new model; ``restore_s``, to give the
        optimizer what the strategy keeps of moments (and masters).

    Raises:
        TrainingError: a run failed.
    """
    for strategy in strategies:
        n_own = 1 if strategy == "auto" else n_processes
        with tempfile.TemporaryDirectory(dir=folder, prefix="rwkv-train-bench-") as name:
            trainer: Json = {
                "strategy": strategy,
                "devices": n_own,
                "accelerator": accelerator,
                "max_steps": N_WARM_UP + repeats,
                "global_batch_size": n_own,
                "micro_batch_size": 1,
            }
            checkpoint = {"every_n_steps": 1, "keep_last": 1}
            settings = settings_of_trial(config, Path(name), trainer, checkpoint)
            found = run_trial(SaveTimer.__module__, settings, n_threads=1)
            yield _row(settings, repeats, found, _write_seconds(Path(name), found["bytes"]))


class SaveTimer(TimedCallback):
    """Lets a run save after every step, then reads the last checkpoint back."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.timed_keeper = _TimedKeeper(config, processes)
        super().__init__(config, processes, self.timed_keeper)
        self._config = config
        self._found: Json = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what follows a step; after the last one, take the way back."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._config.trainer.max_steps:
            assert self.keeper.newest is not None
            self._found = {
                "bytes": sum(file.stat().st_size for file in self.keeper.newest.iterdir()),
                "save": self.timed_keeper.seconds[N_WARM_UP:],
                **self._way_back(pl_module, self.keeper.newest),
            }

    def result(self) -> Json:
        """Return the size of a checkpoint and the seconds of each save and each way back."""
        return self._found

    def _way_back(self, module: TrainingModule, folder: Path) -> dict[str, list[float]]:
        """Measure what a resumed run does, in its order; the slowest process counts."""
        seconds: dict[str, list[float]] = {"verify": [], "weights": [], "restore": []}
        for _ in range(len(self.timed_keeper.seconds) - N_WARM_UP):
            marks = [now()]
            if self.processes.is_first:
                saved = open_training_checkpoint(folder, verify=True)
            self.processes.any_of(False)
            marks.append(now())
            if not self.processes.is_first:
                saved = open_training_checkpoint(folder, verify=False)
            _new_model(saved, self._config)
            marks.append(now())
            self.processes.any_of(False)
            marks.append(now())
            module.engine.restore(saved)
            marks.append(now())
            own = {
                "verify": marks[1] - marks[0],
                "weights": marks[2] - marks[1],
                "restore": marks[4] - marks[3],
            }
            everyone = self.processes.gather(own)
            for name, values in seconds.items():
                values.append(max(one[name] for one in everyone))
        return seconds


class _TimedKeeper(CheckpointKeeper):
    """Notes how long training waits for each save."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        super().__init__(PretrainingTask(config), processes, None, EarlyStopping(None), beat=lambda: None)
        self.seconds: list[float] = []

    def save(self, module: TrainingModule, seconds: float, validation: Validation | None) -> None:
        before = now()
        super().save(module, seconds, validation)
        self.seconds.append(now() - before)


def _new_model(saved: TrainingCheckpoint, config: TrainConfig) -> None:
    build_model(config.model).load_state_dict(saved.weights())


def _write_seconds(folder: Path, n_bytes: int) -> float:
    """Measure what it takes to write and flush bytes."""
    block = os.urandom(1 << 24)
    before = now()
    with (folder / "bytes").open("wb") as file:
        while file.tell() < n_bytes:
            file.write(block[: n_bytes - file.tell()])
        file.flush()
        os.fsync(file.fileno())
    return now() - before


def _row(settings: TrainConfig, repeats: int, found: Json, write_seconds: float) -> Json:
    config = settings.model
    gb = found["bytes"] / 1e9
    save, verify, weights, restore = (
        statistics.median(found[name]) for name in ("save", "verify", "weights", "restore")
    )
    return {
        "strategy": settings.trainer.strategy,
        "processes": settings.trainer.world_size,
        "arch": config.arch,
        "L": config.n_layer,
        "C": config.n_embd,
        "parameters": count_parameters(config),
        "repeats": repeats,
        "gb": gb,
        "write_s": write_seconds,
        "save_s": save,
        "save_gb_per_s": gb / save,
        "verify_s": verify,
        "weights_s": weights,
        "restore_s": restore,
    }


if __name__ == "__main__":
    sys.exit(main(SaveTimer))
