"""The loss of held-out pairs, and how often the model prefers the better answer."""

import logging
from collections.abc import Callable, Mapping

import torch

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.pair_batches import Reference, join_pairs
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.rows import fill_pair_row, pack_pairs
from rwkv_train.errors import CheckpointError
from rwkv_train.evaluation.totals import Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.answers import Answerer
from rwkv_train.training.model_calls import ModelCalls
from rwkv_train.training.objective import Objective, on_device
from rwkv_train.training.validation import Answer, Validation, metric_columns

logger = logging.getLogger(__name__)


class PairValidator:
    """Scores the same held-out pairs each time; see :class:`~rwkv_train.training.validation.Validator`.

    Args:
        held_out: pairs by dataset.
        reference: their log-probabilities before the run; ``None`` where the loss needs none.
        objective: the loss.
        tokenizer: the model's.
        config: the settings of the run.
        processes: the processes of the run; pairs are dealt out to them.
        beat: called after each call of the model, as a sign of progress.
    """

    def __init__(
        self,
        held_out: Mapping[str, list[PreferencePair]],
        reference: Mapping[str, Reference] | None,
        objective: Objective,
        tokenizer: Tokenizer,
        config: FinetuneConfig,
        processes: Processes,
        beat: Callable[[], None],
    ) -> None:
        self._held_out = held_out
        self._reference = reference
        self._objective = objective
        self._domains = sorted(held_out) if len(held_out) > 1 else []
        self._metrics = [f"val_{name}" for name in objective.metrics]
        self.columns = [*metric_columns(self._domains), *self._metrics]
        self.last: Validation | None = None
        self._answers = Answerer(tokenizer, config, processes)
        self._settings = config.trainer
        self._ctx_len = config.model.ctx_len
        self._processes = processes
        self._beat = beat

    def run(self, model: LanguageModel, step: int) -> Validation:
        """Score the pairs and let the model answer. All processes call this together.

        Raises:
            CheckpointError: the loss is not finite; on all processes.
            OSError: an answer cannot be written; on all processes.
        """
        model.eval()
        calls = ModelCalls(model, self._processes, together=self._settings.is_sharded, beat=self._beat)
        sums: dict[str, list[float]] = {}
        with self._processes.failing_together(), calls.finished_by_all():
            sums = {name: self._score(calls.as_model(), name) for name in self._held_out}
        parts = self._processes.gather(sums)
        found = {
            name: [sum(values) for values in zip(*(part[name] for part in parts), strict=True)]
            for name in sums
        }
        # A pair counts as a token, whose loss it is.
        totals = {
            name: Totals(documents=len(held), tokens=len(held), nats=found[name][0])
            for name, held in self._held_out.items()
        }
        pooled = Totals()
        for part in totals.values():
            pooled += part
        answers: tuple[Answer, ...] = ()
        with self._processes.failing_together(), calls.finished_by_all():
            if not torch.tensor(pooled.nats).isfinite():
                raise CheckpointError(f"step {step}: the loss of the held-out pairs is {pooled.nats:g}")
            answers = self._answers.write(calls.as_model(), step)
        model.train()
        metrics = {
            name: sum(values[number] for values in found.values()) / pooled.tokens
            for number, name in enumerate(self._metrics, start=1)
        }
        by_name = {name: totals[name] for name in self._domains}
        self.last = Validation(pooled, by_name, step, self._objective.unit, metrics, answers)
        accuracy = metrics["val_reward_accuracy"]
        logger.info("step %d: validation loss %.4f nats/pair, accuracy %.3f", step, pooled.loss, accuracy)
        return self.last

    @torch.no_grad()
    def _score(self, model: LanguageModel, name: str) -> list[float]:
        """Return the loss and the metrics of this process' share of a dataset, summed over its pairs."""
        numbers = range(self._processes.rank, len(self._held_out[name]), self._settings.world_size)
        pairs = [self._held_out[name][number] for number in numbers]
        rows = pack_pairs([pair.n_inputs for pair in pairs], self._ctx_len)
        at_once = self._settings.micro_batch_size
        device = next(model.parameters()).device
        sums = [0.0] * (1 + len(self._metrics))
        for first in range(0, len(rows), at_once):
            here = rows[first : first + at_once]
            reference = None
            if self._reference is not None:
                places = torch.tensor([numbers[place] for row in here for place in row])
                chosen, rejected = (values[places] for values in self._reference[name])
                reference = chosen, rejected
            filled = [fill_pair_row([pairs[place] for place in row], self._ctx_len) for row in here]
            batch = on_device(join_pairs(filled, reference, n_pairs=1), device)
            losses = self._objective(model, batch, 0.0)
            values = [losses.loss, *(losses.metrics[name] for name in self._objective.metrics)]
            sums = [total + float(value) for total, value in zip(sums, values, strict=True)]
        return sums
