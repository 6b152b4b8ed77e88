"""Which checkpoints a run writes, which it keeps, and what is in them."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

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
        self._validation: Validation | None = None
        self.newest: Path | None = None
        """The checkpoint written last by this process."""

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint follows this step."""
        return step % self._config.checkpoint.every_n_steps == 0

    def is_best(self, validation: Validation) -> bool:
        """Note a validation; return whether it is the best one so far."""
        self._validation = validation
        return self._best is None or validation.loss < self._best["loss"]

    def save(
        self, module: PretrainModule, optimizer: torch.optim.Optimizer, seconds: float, *, is_best: bool
    ) -> None:
        """Write a checkpoint, then remove those that are no longer kept."""
        step = module.completed_steps
        if not self._is_writer:
            return
        moments = named_moments(optimizer)
        state = TrainingState(
            weights={name: tensor.detach() for name, tensor in module.model.state_dict().items()},
            exp_avg=moments["exp_avg"],
            exp_avg_sq=moments["exp_avg_sq"],
            manifest=self._manifest(step, seconds),
        )
        self.newest = save_training_checkpoint(self._out_dir, state)
        logger.debug("wrote %s", self.newest)
        if is_best:
            assert self._validation is not None
            self._best = {"checkpoint": self.newest.name, "step": step, "loss": self._validation.loss}
            self._note_best()
        keep = {self.newest.parent / self._best["checkpoint"]} if self._best else set()
        prune_training_checkpoints(self._out_dir, self._config.checkpoint.keep_last, keep)

    def _note_best(self) -> None:
        text = json.dumps(self._best)
        with new_file(_best_file(self._out_dir), len(text)) as new:
            new.write_text(text, encoding="utf-8")

    def _manifest(self, step: int, seconds: float) -> dict[str, Any]:
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
            "validation": None if self._validation is None else self._validation.to_json(),
        }


def read_best(out_dir: Path) -> dict[str, Any] | None:
    """Return the note of a run's best checkpoint: its name, step and validation loss."""
    path = _best_file(out_dir)
    if not path.exists():
        return None
    best: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: encode_random_state(state) for device, state in states.items()}


def restore_random_state(saved: dict[str, str]) -> None:
    """Put torch's random generators where :func:`random_state` found them."""
    torch.set_rng_state(decode_random_state(saved["cpu"]))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(decode_random_state(saved["cuda"]))
