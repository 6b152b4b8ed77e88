"""What validation on conversations and on pairs of them have in common."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic

import torch

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.split import SampleT
from rwkv_train.errors import CheckpointError
from rwkv_train.evaluation.totals import Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.answers import Answerer
from rwkv_train.training.model_calls import ModelCalls
from rwkv_train.training.validation import Answer, Validation, metric_columns

logger = logging.getLogger(__name__)


class HeldOutValidator(ABC, Generic[SampleT]):
    """Measures the same held-out samples each time; see :class:`~rwkv_train.training.validation.Validator`.

    Args:
        held_out: samples by dataset.
        metrics: names of what is measured beside the loss.
        unit: of the loss.
        tokenizer: the model's.
        config: the settings of the run.
        processes: the processes of the run; samples are dealt out to them.
        beat: called after each call of the model, as a sign of progress.
    """

    def __init__(
        self,
        held_out: Mapping[str, list[SampleT]],
        metrics: Sequence[str],
        unit: str,
        tokenizer: Tokenizer,
        config: FinetuneConfig,
        processes: Processes,
        beat: Callable[[], None],
    ) -> None:
        self.held_out: Mapping[str, list[SampleT]] = held_out
        self.settings = config.trainer
        self.ctx_len = config.model.ctx_len
        self.processes = processes
        self.last: Validation | None = None
        self._domains = sorted(held_out) if len(held_out) > 1 else []
        self.columns = [*metric_columns(self._domains), *metrics]
        self._unit = unit
        self._answers = Answerer(tokenizer, config, processes)
        self._beat = beat

    @abstractmethod
    def score(self, model: LanguageModel, name: str) -> list[float]:
        """Return the loss of this process' share of a dataset, and what else is measured: sums."""

    @abstractmethod
    def count(self, name: str) -> int:
        """Return how many tokens or pairs of a dataset the loss is the mean of."""

    @abstractmethod
    def metrics_of(self, pooled: Totals, sums: Sequence[float]) -> dict[str, float]:
        """Return what is measured beside the loss, from the sums over all datasets."""

    def run(self, model: LanguageModel, step: int) -> Validation:
        """Measure and let the model answer. All processes call this together.

        Raises:
            CheckpointError: the loss is not finite; on all processes.
            OSError: an answer cannot be written; on all processes.
        """
        model.eval()
        calls = ModelCalls(model, self.processes, together=self.settings.is_sharded, beat=self._beat)
        own: dict[str, list[float]] = {}
        with self.processes.failing_together(), calls.finished_by_all(), torch.no_grad():
            own = {name: self.score(calls.as_model(), name) for name in self.held_out}
        parts = self.processes.gather(own)
        sums = {name: _add([part[name] for part in parts]) for name in self.held_out}
        totals = {
            name: Totals(documents=len(held), tokens=self.count(name), nats=sums[name][0])
            for name, held in self.held_out.items()
        }
        pooled = Totals()
        for part in totals.values():
            pooled += part
        answers: tuple[Answer, ...] = ()
        with self.processes.failing_together(), calls.finished_by_all():
            if not torch.tensor(pooled.nats).isfinite():
                raise CheckpointError(f"step {step}: the held-out loss is {pooled.nats:g}")
            answers = self._answers.write(calls.as_model(), step)
        model.train()
        metrics = self.metrics_of(pooled, _add(list(sums.values())))
        by_name = {name: totals[name] for name in self._domains}
        self.last = Validation(pooled, by_name, step, self._unit, metrics, answers)
        others = ", ".join(f"{name.removeprefix('val_')} {value:.4g}" for name, value in metrics.items())
        logger.info("step %d: validation loss %.4f %s, %s", step, pooled.loss, self._unit, others)
        return self.last


def _add(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) for values in zip(*rows, strict=True)]
