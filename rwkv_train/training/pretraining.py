"""Pretraining: a corpus of text, and every parameter of the model."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.manifest import Shapes
from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.checkpoints.weights import read_weights
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.module import MicroBatches, Position
from rwkv_train.data.streaming import StreamSamples
from rwkv_train.errors import ConfigError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.parallel.processes import Processes
from rwkv_train.training.corpora import go_to, open_corpora, open_samples, samples_in_epoch
from rwkv_train.training.objective import NextTokenLoss
from rwkv_train.training.schedule import RunLength, run_length
from rwkv_train.training.validation import CorpusValidator

logger = logging.getLogger(__name__)


class PretrainingTask:
    """The task of ``rwkv-train pretrain``; see :class:`~rwkv_train.training.task.Task`.

    Args:
        config: the settings of the run.

    Raises:
        DataError: the corpus cannot be used.
    """

    learned: Shapes | None = None

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._corpora = open_corpora(config)
        self.tokenizer = self._corpora.tokenizer
        self.source = open_samples(config, self._corpora)
        valid = self._corpora.valid
        self.held_out: dict[str, object] | None = None
        if valid is not None:
            self.held_out = {**valid.identify(), "val_tokens": config.trainer.val_tokens}
        self.objective = NextTokenLoss()

    def run_length(self) -> RunLength:
        """Return the length of the whole run."""
        slots = samples_in_epoch(self.config, self._corpora)
        return run_length(self.config.trainer, self.config.model.ctx_len, slots)

    def go_to(self, first_sample: int, saved: TrainingCheckpoint | None) -> None:
        """Bring a stream to where the run goes on."""
        go_to(self.source, first_sample, saved)

    def make_model(self, wkv_backend: str, saved: TrainingCheckpoint | None) -> LanguageModel:
        """Build the model, with the weights of the checkpoint, of ``model.init_from`` or the published ones."""
        config = self.config
        model = build_model(config.model, wkv_backend=wkv_backend)
        if saved is not None:
            model.load_state_dict(saved.weights())
        elif config.model.init_from is not None:
            weights = read_weights(config.model.init_from)
            if weights.tokenizer is not None and not weights.tokenizer.matches(self.tokenizer.identity):
                raise ConfigError(
                    f"model.init_from ({config.model.init_from}) was trained with the tokenizer "
                    f"'{weights.tokenizer.name}', the corpus was made with '{self.tokenizer.identity.name}'; use the "
                    "same one"
                )
            model.load_state_dict(weights.tensors)
            logger.info("starting from the weights of %s", config.model.init_from)
        else:
            initialize(model, config.trainer.seed)
        return model

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Do nothing."""

    def batches(self, rank: int, start: Position, n_steps: int) -> MicroBatches:
        """Return the micro-batches of a process, from a position to the end of the run."""
        end = self.tokenizer.end_of_document if self.config.is_packed else None
        return MicroBatches(self.source, self.config, rank, start, n_steps, end)

    def make_validator(self, processes: Processes, beat: Callable[[], None]) -> CorpusValidator | None:
        """Return what scores the validation corpus, if there is one."""
        valid = self._corpora.valid
        return None if valid is None else CorpusValidator(valid, self.tokenizer, self.config, processes, beat)

    def manifest(self, n_samples: int) -> tuple[Json, Mapping[str, Tensor]]:
        """Return where a stream stands after so many samples."""
        if not isinstance(self.source, StreamSamples):
            return {}, {}
        state = self.source.state_at(n_samples)
        return {"data": {"stream": state.to_json()}}, state.to_tensors()

    def add_files(self, folder: Path, learned: Mapping[str, Tensor], step: int) -> None:
        """Add nothing: the weights are the model."""
