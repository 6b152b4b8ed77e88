"""The held-out loss of conversations, with the mask of training, and what the model answers to fixed prompts."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.batches import carry_of, join_rows
from rwkv_train.data.instruct.dealing import DealtRow
from rwkv_train.data.instruct.rows import Chain, fill_row, pack
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import MicroBatch
from rwkv_train.errors import CheckpointError
from rwkv_train.evaluation.totals import Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.answers import Answerer
from rwkv_train.training.model_calls import ModelCalls
from rwkv_train.training.objective import NextTokenLoss, on_device
from rwkv_train.training.validation import Answer, Validation, metric_columns

logger = logging.getLogger(__name__)

PERPLEXITY = "val_perplexity"


class ConversationValidator:
    """Scores the same held-out conversations each time; see :class:`~rwkv_train.training.validation.Validator`.

    Args:
        held_out: conversations by dataset; :func:`~rwkv_train.data.instruct.split.head_of` chooses them.
        tokenizer: the model's.
        config: the settings of the run.
        processes: the processes of the run; rows are dealt out to them.
        beat: called after each call of the model, as a sign of progress.
    """

    def __init__(
        self,
        held_out: dict[str, list[TokenizedConversation]],
        tokenizer: Tokenizer,
        config: FinetuneConfig,
        processes: Processes,
        beat: Callable[[], None],
    ) -> None:
        self._held_out = held_out
        self._domains = sorted(held_out) if len(held_out) > 1 else []
        self.columns = [*metric_columns(self._domains), PERPLEXITY]
        self.last: Validation | None = None
        self._answers = Answerer(tokenizer, config, processes)
        self._settings = config.trainer
        self._ctx_len = config.model.ctx_len
        self._processes = processes
        self._beat = beat

    def run(self, model: LanguageModel, step: int) -> Validation:
        """Score the conversations and let the model answer. All processes call this together.

        Raises:
            CheckpointError: the loss is not finite; on all processes.
            OSError: an answer cannot be written; on all processes.
        """
        model.eval()
        calls = ModelCalls(model, self._processes, together=self._settings.is_sharded, beat=self._beat)
        sums: dict[str, float] = {}
        with self._processes.failing_together(), calls.finished_by_all():
            sums = {name: self._score(calls.as_model(), held) for name, held in self._held_out.items()}
        parts = self._processes.gather(sums)
        totals = {
            name: Totals(
                documents=len(held),
                tokens=sum(conversation.n_learned for conversation in held),
                nats=sum(part[name] for part in parts),
            )
            for name, held in self._held_out.items()
        }
        pooled = Totals()
        for part in totals.values():
            pooled += part
        answers: tuple[Answer, ...] = ()
        with self._processes.failing_together(), calls.finished_by_all():
            if not torch.tensor(pooled.nats).isfinite():
                raise CheckpointError(
                    f"step {step}: the loss of the held-out conversations is {pooled.nats:g}"
                )
            answers = self._answers.write(calls.as_model(), step)
        model.train()
        by_name = {name: totals[name] for name in self._domains}
        metrics = {PERPLEXITY: pooled.token_ppl}
        self.last = Validation(pooled, by_name, step, metrics=metrics, answers=answers)
        logger.info(
            "step %d: validation loss %.4f nats/token, perplexity %.4g", step, pooled.loss, pooled.token_ppl
        )
        return self.last

    @torch.no_grad()
    def _score(self, model: LanguageModel, held: Sequence[TokenizedConversation]) -> float:
        """Return the loss of this process' share of a dataset."""
        chains = pack([conversation.n_inputs for conversation in held], self._ctx_len)
        own = chains[self._processes.rank :: self._settings.world_size]
        device = next(model.parameters()).device
        total = 0.0
        objective = NextTokenLoss()
        for batch in batches_of(own, held, self._ctx_len, self._settings.micro_batch_size):
            total += float(objective(model, on_device(batch, device), 0.0).loss)
        return total


def batches_of(
    chains: Sequence[Chain], conversations: Sequence[TokenizedConversation], ctx_len: int, n_lanes: int
) -> Iterator[MicroBatch]:
    """Yield chains as micro-batches of at most ``n_lanes`` rows: a chain's rows come one after another in its lane."""
    for first in range(0, len(chains), n_lanes):
        lanes = chains[first : first + n_lanes]
        for number in range(max(map(len, lanes))):
            # Longest first, so that the lanes that are left are the first ones.
            left = [chain for chain in sorted(lanes, key=len, reverse=True) if len(chain) > number]
            dealt = [DealtRow(chain[number], number + 1 < len(chain)) for chain in left]
            filled = [fill_row(row, conversations, ctx_len) for row, _ in dealt]
            yield join_rows(filled, 1, carry=carry_of(dealt, 0, ctx_len))
