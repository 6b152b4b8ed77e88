"""What each strategy costs: the time of a step of one model, with one process and with several."""

import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_train.benchmarks.trial import Json, TimedCallback, main, now, run_trial, settings_of_trial
from rwkv_train.config.model import ModelConfig, Rwkv7Config
from rwkv_train.config.train import TrainConfig
from rwkv_train.parallel.processes import Processes
from rwkv_train.training.early_stopping import EarlyStopping
from rwkv_train.training.keeper import CheckpointKeeper
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.pretraining import PretrainingTask
from rwkv_train.training.validation import Validation

N_WARM_UP = 3
"""Steps that are not counted: they allocate, wake the threads and make the optimizer's states."""

ALL = ("auto", "ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "fsdp2")
"""Strategies; "auto" is one process without any."""


class Case(NamedTuple):
    """What a step trains: a model and the samples in it, over all processes."""

    config: ModelConfig
    batch_size: int


class Crew(NamedTuple):
    """How many processes share a step, and how many threads each has."""

    n_processes: int
    n_threads: int


STANDARD_CPU = Case(Rwkv7Config(n_layer=6, n_embd=256, vocab_size=257, ctx_len=256), 4)
STANDARD_GPU = Case(Rwkv7Config(n_layer=12, n_embd=768, vocab_size=65_536, ctx_len=1024), 8)
CREWS = {"cpu": (Crew(1, 1), Crew(1, 2), Crew(2, 1)), "gpu": (Crew(1, 1), Crew(2, 1))}
"""By accelerator. On CPUs: one process on one core and on two, and two that have a core each."""


def bench_strategies(
    case: Case,
    *,
    strategies: Sequence[str] = ALL,
    crews: Sequence[Crew] = CREWS["cpu"],
    accelerator: str = "cpu",
    repeats: int = 10,
    rounds: int = 2,
) -> Iterator[Json]:
    """Measure the steps of a run, from data to the exchange after the update, as ``pretrain`` makes them.

    Every measurement is a run of its own in processes of its own, without validation and saves. All kinds take turns,
    so that what else the machine does in the meantime falls on all of them.

    Args:
        case: the model and its batch, which the processes divide.
        strategies: names of ``trainer.strategy``; "auto" only with one process, where it is no strategy.
        crews: numbers of processes and threads; "gpu" needs as many GPUs as processes.
        accelerator: ``"cpu"`` or ``"gpu"``.
        repeats: steps of a run that are measured.
        rounds: runs of each kind; the median of all their steps counts.

    Yields:
        In the last round, one row for each strategy and crew: ``step_ms`` (median) and ``min_ms``; ``setup_s``, from
        the start of the run to its first step, in which libraries load, processes meet and parameters are made and
        spread; ``peak_mib``, the largest memory that a process has had on the device.

    Raises:
        TrainingError: a run failed.
    """
    kinds = [
        (strategy, crew)
        for strategy in strategies
        for crew in crews
        if strategy != "auto" or crew.n_processes == 1
    ]
    found: dict[tuple[str, Crew], list[Json]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for strategy, crew in kinds:
                trainer: Json = {
                    "strategy": strategy,
                    "devices": crew.n_processes,
                    "accelerator": accelerator,
                    "max_steps": N_WARM_UP + repeats,
                    "global_batch_size": case.batch_size,
                    "micro_batch_size": case.batch_size // crew.n_processes,
                }
                config = settings_of_trial(case.config, Path(folder), trainer)
                runs = found[strategy, crew]
                runs.append(run_trial(StepTimer.__module__, config, crew.n_threads))
                if len(runs) == rounds:
                    yield _row(case, strategy, crew, runs)


class StepTimer(TimedCallback):
    """Notes the time after each step, with all that is done around it."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self._marks: list[float] = []
        self._setup_seconds = 0.0
        self._peak_bytes = 0
        super().__init__(config, processes, _NoCheckpoints(config, processes))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        super().on_train_start(trainer, pl_module)
        self._marks.append(now())
        self._setup_seconds = self._marks[0] - self.began

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what follows a step, then note the time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == len(self._marks):
            self._marks.append(now())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask all processes for their memory."""
        super().on_train_end(trainer, pl_module)
        self._peak_bytes = max(self.processes.gather(_peak_bytes()))

    def result(self) -> Json:
        """Return the seconds of each step after the warm-up, of the set-up, and the peak of memory."""
        steps = [after - before for before, after in pairwise(self._marks)]
        return {
            "steps": steps[N_WARM_UP:],
            "setup_seconds": self._setup_seconds,
            "peak_bytes": self._peak_bytes,
        }


class _NoCheckpoints(CheckpointKeeper):
    """Saves nothing, not even at the end."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        super().__init__(PretrainingTask(config), processes, None, EarlyStopping(None), beat=lambda: None)

    def is_due(self, step: int) -> bool:
        return False

    def save(self, module: TrainingModule, seconds: float, validation: Validation | None) -> None:
        pass


def _peak_bytes() -> int:
    """The largest memory that this process has had: on its GPU, or of the machine where it has none."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _row(case: Case, strategy: str, crew: Crew, runs: Sequence[Json]) -> Json:
    config = case.config
    steps = [seconds for run in runs for seconds in run["steps"]]
    median = statistics.median(steps)
    return {
        "strategy": strategy,
        "processes": crew.n_processes,
        "threads": crew.n_threads,
        "arch": config.arch,
        "L": config.n_layer,
        "C": config.n_embd,
        "B": case.batch_size,
        "T": config.ctx_len,
        "repeats": len(steps),
        "step_ms": 1e3 * median,
        "min_ms": 1e3 * min(steps),
        "tokens_per_second": case.batch_size * config.ctx_len / median,
        "setup_s": statistics.median(run["setup_seconds"] for run in runs),
        "peak_mib": max(run["peak_bytes"] for run in runs) / 2**20,
    }


if __name__ == "__main__":
    sys.exit(main(StepTimer))
