"""Finetuning on conversations."""

from collections.abc import Callable

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.batches import ConversationBatches, InstructSamples, hash_of
from rwkv_train.data.instruct.split import Split, head_of
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import Position
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.conversation_validation import ConversationValidator
from rwkv_train.training.finetuning_task import FinetuningTask
from rwkv_train.training.objective import NextTokenLoss, Objective


class ConversationTask(FinetuningTask):
    """Learn from conversations.

    Args:
        config: the settings of the run, without a section ``preference``.
        tokenizer: the model's.
        split: the conversations.
    """

    def __init__(
        self, config: FinetuneConfig, tokenizer: Tokenizer, split: Split[TokenizedConversation]
    ) -> None:
        super().__init__(config, tokenizer)
        datasets = [one.samples for one in split.train]
        self.samples: InstructSamples[TokenizedConversation] = InstructSamples(
            datasets, [hash_of(dataset) for dataset in datasets], config
        )
        self.valid: dict[str, list[TokenizedConversation]] = head_of(split.valid, config.trainer.val_tokens)
        self.held_out = {name: hash_of(held) for name, held in self.valid.items()} or None
        self.objective: Objective = NextTokenLoss()

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Do nothing."""

    def batches(self, rank: int, start: Position, n_steps: int) -> ConversationBatches:
        """Return the micro-batches of a process, from a position to the end of the run."""
        return ConversationBatches(self.samples, self.config, rank, start, n_steps)

    def make_validator(self, processes: Processes, beat: Callable[[], None]) -> ConversationValidator | None:
        """Return what scores the held-out conversations, if there are any."""
        if not self.valid:
            return None
        return ConversationValidator(self.valid, self.tokenizer, self.config, processes, beat)
