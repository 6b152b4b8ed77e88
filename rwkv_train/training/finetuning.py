"""Finetuning: conversations, and the parameters that the method learns."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.manifest import Shapes
from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.methods import FreezeMethod
from rwkv_train.data.instruct.batches import ConversationBatches, ConversationSamples, hash_of
from rwkv_train.data.instruct.split import read_data
from rwkv_train.data.module import Position
from rwkv_train.finetuning.base import read_base
from rwkv_train.finetuning.freezing import freeze, require_learning
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.conversation_validation import ConversationValidator, head_of
from rwkv_train.training.objective import NextTokenLoss
from rwkv_train.training.resume import AUTO
from rwkv_train.training.run import RunSummary, run_task
from rwkv_train.training.schedule import RunLength, length_of

logger = logging.getLogger(__name__)


def run_finetuning(
    config: FinetuneConfig, resume: str = AUTO, allow_change: Collection[str] = ()
) -> RunSummary:
    """Finetune a model as the settings say, or go on from where an earlier process was stopped.

    Args:
        config: the settings of the run.
        resume: as in :func:`~rwkv_train.training.run.run_pretraining`.
        allow_change: as there.

    Raises:
        RwkvTrainError: as there; the data, the base or the method do not fit each other.
    """
    return run_task(config, lambda: FinetuningTask(config), resume, allow_change)


class FinetuningTask:
    """The task of ``rwkv-train finetune``; see :class:`~rwkv_train.training.task.Task`.

    Args:
        config: the settings of the run.

    Raises:
        DataError: the conversations cannot be used.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        data = read_data(config.data, self.tokenizer, config.trainer.seed)
        self.source = ConversationSamples([one.samples for one in data.train], config)
        self._held_out = head_of(data.valid, config.trainer.val_tokens) if data.valid else None
        self.held_out: dict[str, object] | None = None
        if self._held_out is not None:
            self.held_out = {name: hash_of(held) for name, held in self._held_out.items()}
        self.objective = NextTokenLoss()
        self.learned: Shapes | None = None

    def run_length(self) -> RunLength:
        """Return the length of the whole run."""
        epochs = self.config.trainer.max_epochs
        n_steps = None if epochs is None else self.source.dealer.n_steps(epochs)
        return length_of(self.config.trainer, self.config.model.ctx_len, n_steps)

    def go_to(self, first_sample: int, saved: TrainingCheckpoint | None) -> None:
        """Do nothing: rows are found by their step."""

    def make_model(self, wkv_backend: str, saved: TrainingCheckpoint | None) -> LanguageModel:
        """Build the base and let the method take hold of it."""
        method = self.config.finetune
        model = build_model(self.config.model, wkv_backend=wkv_backend)
        if saved is not None:
            model.load_state_dict(saved.weights())
        else:
            model.load_state_dict(read_base(self.config, self.tokenizer).tensors)
        if isinstance(method, FreezeMethod):
            freeze(model, method)
        require_learning("finetune.lr_factors", self.config.lr_factors, model)
        return model

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Do nothing."""

    def batches(self, rank: int, start: Position, n_steps: int) -> ConversationBatches:
        """Return the micro-batches of a process, from a position to the end of the run."""
        return ConversationBatches(self.source, self.config, rank, start, n_steps)

    def make_validator(self, processes: Processes, beat: Callable[[], None]) -> ConversationValidator | None:
        """Return what scores the held-out conversations, if there are any."""
        if self._held_out is None:
            return None
        return ConversationValidator(self._held_out, self.tokenizer, self.config, processes, beat)

    def manifest(self, n_samples: int) -> tuple[Json, Mapping[str, Tensor]]:
        """Return what was learned beside which base."""
        return {}, {}

    def add_files(self, folder: Path, learned: Mapping[str, Tensor], step: int) -> None:
        """Add nothing: the weights are the model."""
