"""Which checkpoints a run writes, which it keeps, and what is in them."""

import logging
from pathlib import Path
from typing import Any

import torch

from rwkv_train.checkpoints.descriptions import read_json, write_json
from rwkv_train.checkpoints.formats import CHECKPOINTS_FOLDER
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.io import new_file
from rwkv_train.checkpoints.training_state import (
    TrainingState,
    decode_random_state,
    encode_random_state,
    prune_training_checkpoints,
    save_training_checkpoint,
)
from rwkv_train.config.save import to_tree
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.stored import Corpus
from rwkv_train.errors import CheckpointError
from rwkv_train.tokenizers import TokenizerIdentity
from rwkv_train.training.module import PretrainModule, named_moments
from rwkv_train.training.validation import Validation

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Writes checkpoints at an interval and keeps the newest few and the best one.

    Args:
        config: the settings of the run, saved with each checkpoint.
        tokenizer: identity of the corpus' tokenizer.
        corpus: the training corpus.
        is_writer: whether this process writes; exactly one does.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: TokenizerIdentity, corpus: Corpus, *, is_writer: bool
    ) -> None:
        self._config = config
        self._corpus = identify_corpus(corpus)
        self._tokenizer = tokenizer
        self._is_writer = is_writer
        self._out_dir = config.trainer.run_folder
        self._best = read_best(self._out_dir)
        self.newest: Path | None = None
        """The checkpoint written last by this process."""

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint follows this step."""
        return step % self._config.checkpoint.every_n_steps == 0

    def is_best(self, validation: Validation) -> bool:
        """Return whether a validation is better than that of every checkpoint so far."""
        return self._best is None or validation.loss < self._best["loss"]

    def save(
        self,
        module: PretrainModule,
        optimizer: torch.optim.Optimizer,
        seconds: float,
        validation: Validation | None,
    ) -> None:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            module: holds the model and the step.
            optimizer: holds Adam's moments.
            seconds: time spent in training steps since the very start of the run.
            validation: the result at this very step; ``None`` where it was not measured.
        """
        step = module.completed_steps
        if not self._is_writer:
            return
        moments = named_moments(optimizer)
        state = TrainingState(
            weights={name: tensor.detach() for name, tensor in module.model.state_dict().items()},
            exp_avg=moments["exp_avg"],
            exp_avg_sq=moments["exp_avg_sq"],
            manifest=self._manifest(step, seconds, validation),
        )
        self.newest = save_training_checkpoint(self._out_dir, state)
        logger.debug("wrote %s", self.newest)
        if validation is not None and self.is_best(validation):
            self._best = {"checkpoint": self.newest.name, "step": step, "loss": validation.loss}
            with new_file(_best_file(self._out_dir), n_bytes=0) as new:
                write_json(new, self._best)
        keep = {self.newest.parent / self._best["checkpoint"]} if self._best else set()
        prune_training_checkpoints(self._out_dir, self._config.checkpoint.keep_last, keep)

    def _manifest(self, step: int, seconds: float, validation: Validation | None) -> dict[str, Any]:
        settings = self._config.trainer
        return {
            "step": step,
            "tokens": step * settings.global_batch_size * self._config.model.ctx_len,
            "config": to_tree(self._config),
            "arch_config": to_tree(make_explicit(self._config.model)),
            "tokenizer": self._tokenizer._asdict(),
            "data": {"samples": step * settings.global_batch_size, "train": self._corpus},
            "random": random_state(),
            "train_seconds": seconds,
            "validation": None if validation is None else validation.to_json(),
        }


def read_best(out_dir: Path) -> dict[str, Any] | None:
    """Return the note of a run's best checkpoint: its name, step and validation loss."""
    path = _best_file(out_dir)
    if not path.exists():
        return None
    best = read_json(path)
    if not isinstance(best.get("checkpoint"), str) or not isinstance(best.get("loss"), float):
        raise CheckpointError(
            f"{path} does not name the best checkpoint and its loss; remove it to go on without"
        )
    return best


def _best_file(out_dir: Path) -> Path:
    return out_dir / CHECKPOINTS_FOLDER / "best.json"


def identify_corpus(corpus: Corpus) -> dict[str, Any]:
    """Return what a resumed run recognises its corpus by, wherever it lies then."""
    return {
        "tokens": corpus.tokens.n_tokens,
        "sha256": None if corpus.sidecar is None else corpus.sidecar.sha256,
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
