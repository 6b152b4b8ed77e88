"""What pretraining and finetuning have in common for a run, which does not know which of them it is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset

from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.manifest import Shapes
from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.run import RunConfig
from rwkv_train.data.module import DataSource, MicroBatch, Position
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.objective import Objective
from rwkv_train.training.schedule import RunLength
from rwkv_train.training.validation import Validator


class Task(Protocol):
    """What a run learns, from what, and with which of its parameters. Made in every process of the run."""

    tokenizer: Tokenizer
    held_out: dict[str, object] | None
    """What validation is on, as JSON's types; ``None``: there is none."""
    learned: Shapes | None
    """The parameters that a checkpoint stores, where these are not those of the model; known once it is made."""

    @property
    def config(self) -> RunConfig:
        """The settings of the run."""
        ...

    @property
    def source(self) -> DataSource:
        """The training data."""
        ...

    @property
    def objective(self) -> Objective:
        """The loss."""
        ...

    def run_length(self) -> RunLength:
        """Return the length of the whole run."""
        ...

    def go_to(self, first_sample: int, saved: TrainingCheckpoint | None) -> None:
        """Bring the data to where a run goes on.

        Raises:
            CheckpointError: the checkpoint does not say where they stood.
        """
        ...

    def make_model(self, wkv_backend: str, saved: TrainingCheckpoint | None) -> LanguageModel:
        """Build the model with the weights to go on from, ready for a strategy.

        Raises:
            RwkvTrainError: there are no such weights, or they do not fit the settings.
        """
        ...

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Do what has to be done once with the model as it is, before anything is learned; all processes together."""
        ...

    def batches(self, rank: int, start: Position, n_steps: int) -> Dataset[MicroBatch]:
        """Return the micro-batches of a process, from a position to the end of the run."""
        ...

    def make_validator(self, processes: Processes, beat: Callable[[], None]) -> Validator | None:
        """Return what validates; ``None`` where nothing is held out.

        Raises:
            DataError: there is nothing to score.
        """
        ...

    def manifest(self, n_samples: int) -> tuple[Json, Mapping[str, Tensor]]:
        """Return what a checkpoint says of the task, by section, and the tensors of its stream.

        Args:
            n_samples: samples that were read.
        """
        ...

    def add_files(self, folder: Path, learned: Mapping[str, Tensor], step: int) -> None:
        """Write what else a checkpoint is to hold, for other programs.

        Args:
            folder: of the unfinished checkpoint.
            learned: the parameters of ``learned``, float32, on the CPU; empty where that is ``None``.
            step: steps that are done.
        """
        ...
