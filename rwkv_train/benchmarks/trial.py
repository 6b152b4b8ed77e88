"""A run in processes of its own, so that measurements of several strategies share nothing but the machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_train.config.load import check_tree, load_train_config
from rwkv_train.config.model import ModelConfig
from rwkv_train.config.save import to_tree, to_yaml
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import MicroBatches, Position, RunData
from rwkv_train.data.prepare import prepare_data
from rwkv_train.errors import RwkvTrainError, TrainingError
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.parallel.launch import launch, needs_launch
from rwkv_train.parallel.processes import Processes, join_processes
from rwkv_train.parallel.signals import StopSignal
from rwkv_train.parallel.watchdog import Watchdog
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.corpora import open_corpora, open_samples, samples_in_epoch
from rwkv_train.training.guard import Guard
from rwkv_train.training.keeper import CheckpointKeeper
from rwkv_train.training.meter import Meter
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.objective import NextTokenLoss
from rwkv_train.training.precision import prepare_forward
from rwkv_train.training.progress import Display
from rwkv_train.training.schedule import run_length
from rwkv_train.training.strategy import ENGINES, device_of, make_trainer

Json = dict[str, Any]

_STARTED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")


class TimedCallback(RunCallback):
    """The callback of a run, with its parts built for a measurement.

    Args:
        config: the settings of the run.
        processes: its processes.
        keeper: what saves, or does not.
    """

    began: float
    """When the run began, by :func:`now`; its processes had not met yet."""

    def __init__(self, config: TrainConfig, processes: Processes, keeper: CheckpointKeeper) -> None:
        super().__init__(
            processes,
            Meter(config.trainer.global_batch_size * config.model.ctx_len),
            None,
            keeper,
            Display(0, 0, is_shown=False),
            StopSignal(config.trainer.grace_seconds),
            Watchdog(processes, config.trainer.hang_timeout_seconds),
        )

    def result(self) -> Json:
        """Return what was measured; asked of the first process, when training is over."""
        raise NotImplementedError


CallbackOf = Callable[[TrainConfig, Processes], TimedCallback]


def settings_of_trial(
    model: ModelConfig, folder: Path, trainer: Mapping[str, Any], checkpoint: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Return the settings of a trial, whose corpus is made in ``folder`` if it is not there.

    Args:
        model: what is trained.
        folder: where the corpus lies and the run is put.
        trainer: the section of that name, but for ``out_dir``.
        checkpoint: the section of that name.
    """
    prefix = folder / "corpus"
    if not prefix.with_suffix(".idx").exists():
        n_tokens = 64 * (model.ctx_len + 1)
        letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, n_tokens, dtype=np.uint8)
        source = folder / "corpus.txt"
        source.write_bytes(letters.tobytes())
        prepare_data([source], load_tokenizer("bytes"), prefix)
    return check_tree(
        {
            "model": to_tree(model),
            "data": {"train": str(prefix), "valid": None, "tokenizer": "bytes"},
            "trainer": {"out_dir": str(folder / "run"), **trainer},
            "checkpoint": dict(checkpoint or {}),
        }
    )


def run_trial(module: str, config: TrainConfig, n_threads: int) -> Json:
    """Run a measurement in processes of its own and return what it found.

    Args:
        module: full name of the module whose main part calls :func:`main`.
        config: the settings of the run.
        n_threads: threads of each process.

    Raises:
        TrainingError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _STARTED_BY}
    environment["OMP_NUM_THREADS"] = str(n_threads)
    with tempfile.TemporaryDirectory() as name:
        settings, found = Path(name, "settings.yaml"), Path(name, "found.json")
        settings.write_text(to_yaml(config), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", module, str(settings), str(found)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            last = (done.stdout.strip() or "it said nothing").splitlines()[-1]
            trainer = config.trainer
            raise TrainingError(
                f"strategy {trainer.strategy!r} with {trainer.world_size} processes ended with exit code "
                f"{done.returncode}: {last}"
            )
        result: Json = json.loads(found.read_bytes())
    return result


def main(callback_of: CallbackOf) -> int:
    """Be one process of a trial, or start those of a trial with several.

    Args:
        callback_of: makes the callback that measures; its ``result`` is written by the first process.

    Returns:
        The exit code.
    """
    settings, found = sys.argv[1:]
    try:
        config = load_train_config(settings)
        if needs_launch(config.trainer):
            return launch(config.trainer, sys.orig_argv)
        result = train(config, callback_of)
    except RwkvTrainError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if result is not None:
        Path(found).write_text(json.dumps(result), encoding="utf-8")
    return 0


def train(config: TrainConfig, callback_of: CallbackOf) -> Json | None:
    """Train from scratch as ``pretrain`` does, with a callback that measures.

    Returns:
        What it measured, on the first process; ``None`` on the others.
    """
    began = now()
    device = device_of(config.trainer)
    backend = "gloo" if device.type == "cpu" else "nccl"
    needs_group = config.trainer.strategy not in {"auto", "ddp"}
    with join_processes(config.trainer, backend=backend, always=needs_group) as processes:
        callback = callback_of(config, processes)
        callback.began = began
        corpora = open_corpora(config)
        length = run_length(config.trainer, config.model.ctx_len, samples_in_epoch(config, corpora))
        model = build_model(config.model, wkv_backend=choose_wkv_backend(config, device).name)
        initialize(model, config.trainer.seed)
        prepare_forward(model, config.trainer)
        engine = ENGINES[config.trainer.strategy](model, config)
        start = Position(0)
        module = TrainingModule(model, engine, config, length, start, Guard(config.guard), NextTokenLoss())
        trainer = make_trainer(config, length.n_steps, [callback], [])
        end = corpora.tokenizer.end_of_document if config.is_packed else None
        samples = open_samples(config, corpora)
        batches = RunData(lambda rank: MicroBatches(samples, config, rank, start, length.n_steps, end))
        trainer.fit(module, datamodule=batches)
        return callback.result() if processes.is_first else None


def now() -> float:
    """Return the time in seconds at which the device has done what it was given."""
    # Not is_available: asking would start CUDA, in a run on the CPU too.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
