"""The loss of held-out pairs, and how often the model prefers the better answer."""

from collections.abc import Callable, Mapping, Sequence

import torch

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.pair_batches import Reference, join_pairs
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.rows import fill_pair_row, pack_pairs
from rwkv_train.evaluation.totals import Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.held_out import HeldOutValidator
from rwkv_train.training.objective import Objective, on_device


class PairValidator(HeldOutValidator[PreferencePair]):
    """Scores held-out pairs.

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
        metrics = [f"val_{name}" for name in objective.metrics]
        super().__init__(held_out, metrics, objective.unit, tokenizer, config, processes, beat)
        self._reference = reference
        self._objective = objective

    def score(self, model: LanguageModel, name: str) -> list[float]:
        """Return the loss and the metrics of this process' share of a dataset, summed over its pairs."""
        numbers = range(self.processes.rank, len(self.held_out[name]), self.settings.world_size)
        pairs = [self.held_out[name][number] for number in numbers]
        rows = pack_pairs([pair.n_inputs for pair in pairs], self.ctx_len)
        at_once = self.settings.micro_batch_size
        device = next(model.parameters()).device
        sums = [0.0] * (1 + len(self._objective.metrics))
        for first in range(0, len(rows), at_once):
            here = rows[first : first + at_once]
            reference = None
            if self._reference is not None:
                places = torch.tensor([numbers[place] for row in here for place in row])
                chosen, rejected = (values[places] for values in self._reference[name])
                reference = chosen, rejected
            filled = [fill_pair_row([pairs[place] for place in row], self.ctx_len) for row in here]
            batch = on_device(join_pairs(filled, reference, n_pairs=1), device)
            losses = self._objective(model, batch, 0.0)
            values = [losses.loss, *(losses.metrics[metric] for metric in self._objective.metrics)]
            sums = [total + float(value) for total, value in zip(sums, values, strict=True)]
        return sums

    def count(self, name: str) -> int:
        """Return the pairs of a dataset."""
        return len(self.held_out[name])

    def metrics_of(self, pooled: Totals, sums: Sequence[float]) -> dict[str, float]:
        """Return the means over all pairs."""
        names = (f"val_{name}" for name in self._objective.metrics)
        return {name: value / pooled.tokens for name, value in zip(names, sums[1:], strict=True)}
