"""The loss on pairs of answers, of which one is preferred."""

from collections.abc import Mapping

from torch import Tensor

from rwkv_train.config.preference import PreferenceConfig
from rwkv_train.data.module import MicroBatch
from rwkv_train.finetuning.preferences import PairValues, preference_loss, sequence_log_probs
from rwkv_train.models.lm import LanguageModel
from rwkv_train.training.objective import Losses, context_of


class PreferenceObjective:
    """DPO, ORPO or SimPO; see :class:`~rwkv_train.training.objective.Objective`. It is a sum over pairs.

    Args:
        config: which.
    """

    unit: str = "nats/pair"
    metrics: tuple[str, ...] = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")

    def __init__(self, config: PreferenceConfig) -> None:
        self._config = config

    def __call__(self, model: LanguageModel, batch: MicroBatch, l2wrap: float) -> Losses:
        """Compute the losses of a micro-batch; it has no penalty on logits (``l2wrap`` is 0)."""
        assert batch.pairs is not None
        assert l2wrap == 0
        output = model(batch.tokens, targets=batch.targets, context=context_of(batch))
        log_probs, n_tokens = sequence_log_probs(output.losses, batch.targets, batch.cu_seqlens)
        reference = batch.pairs.reference
        loss = preference_loss(
            self._config,
            PairValues(log_probs[batch.pairs.chosen], log_probs[batch.pairs.rejected]),
            PairValues(n_tokens[batch.pairs.chosen], n_tokens[batch.pairs.rejected]),
            None if reference is None else PairValues(*reference),
        )
        total = loss.losses.sum()
        values = (loss.chosen_rewards, loss.rejected_rewards, loss.margins, loss.accuracies)
        sums = {name: value.sum() for name, value in zip(self.metrics, values, strict=True)}
        return Losses(total, total.detach(), sums)

    def carried(self) -> dict[str, Tensor]:
        """Return nothing: a pair is read whole."""
        return {}

    def restore(self, carried: Mapping[str, Tensor], lanes: frozenset[int]) -> None:
        """Do nothing."""

    def forget(self) -> None:
        """Do nothing."""
