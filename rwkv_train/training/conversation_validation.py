"""The held-out loss of conversations, with the mask of training."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.batches import carry_of, join_rows
from rwkv_train.data.instruct.dealing import DealtRow
from rwkv_train.data.instruct.rows import Chain, fill_row, pack
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import MicroBatch
from rwkv_train.evaluation.totals import Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.held_out import HeldOutValidator
from rwkv_train.training.objective import NextTokenLoss, on_device

PERPLEXITY = "val_perplexity"


class ConversationValidator(HeldOutValidator[TokenizedConversation]):
    """Scores held-out conversations, each from its beginning to its end.

    Args:
        held_out: conversations by dataset.
        tokenizer: the model's.
        config: the settings of the run.
        processes: the processes of the run; rows are dealt out to them.
        beat: called after each call of the model, as a sign of progress.
    """

    def __init__(
        self,
        held_out: Mapping[str, list[TokenizedConversation]],
        tokenizer: Tokenizer,
        config: FinetuneConfig,
        processes: Processes,
        beat: Callable[[], None],
    ) -> None:
        super().__init__(held_out, [PERPLEXITY], NextTokenLoss.unit, tokenizer, config, processes, beat)

    def score(self, model: LanguageModel, name: str) -> list[float]:
        """Return the loss of this process' share of a dataset, summed over its learned tokens."""
        held = self.held_out[name]
        chains = pack([conversation.n_inputs for conversation in held], self.ctx_len)
        own = chains[self.processes.rank :: self.settings.world_size]
        device = next(model.parameters()).device
        objective = NextTokenLoss()
        total = 0.0
        for batch in batches_of(own, held, self.ctx_len, self.settings.micro_batch_size):
            total += float(objective(model, on_device(batch, device), 0.0).loss)
        return [total]

    def count(self, name: str) -> int:
        """Return the learned tokens of a dataset."""
        return sum(conversation.n_learned for conversation in self.held_out[name])

    def metrics_of(self, pooled: Totals, sums: Sequence[float]) -> dict[str, float]:
        """Return the perplexity of a learned token."""
        return {PERPLEXITY: pooled.token_ppl}


def batches_of(
    chains: Sequence[Chain], conversations: Sequence[TokenizedConversation], ctx_len: int, n_lanes: int
) -> Iterator[MicroBatch]:
    """Yield chains as micro-batches of at most ``n_lanes`` rows: a chain's rows come one after another in its lane."""
    for first in range(0, len(chains), n_lanes):
        # Longest first, so that the lanes that are left are the first ones.
        lanes = sorted(chains[first : first + n_lanes], key=len, reverse=True)
        for number in range(len(lanes[0])):
            dealt = [
                DealtRow(chain[number], number + 1 < len(chain)) for chain in lanes if number < len(chain)
            ]
            filled = [fill_row(row, conversations, ctx_len) for row, _ in dealt]
            yield join_rows(filled, 1, carry=carry_of(dealt, 0, ctx_len))
