"""Finetuning from settings to summary."""

from collections.abc import Collection
from typing import Any

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.data.instruct.reading import ReadDataset, read_conversations, read_pairs
from rwkv_train.data.instruct.split import Split, read_split
from rwkv_train.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.training.conversation_task import ConversationTask
from rwkv_train.training.preference_task import PreferenceTask
from rwkv_train.training.resume import AUTO
from rwkv_train.training.run import RunSummary, run_task


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
    return run_task(config, lambda: open_finetuning_task(config), resume, allow_change)


def open_finetuning_task(config: FinetuneConfig) -> ConversationTask | PreferenceTask:
    """Read the data of a run.

    Raises:
        DataError: they cannot be used.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)

    def read(data: InstructDataConfig) -> list[ReadDataset[Any]]:
        if config.preference is None:
            return [*read_conversations(data, tokenizer)]
        return [*read_pairs(data, tokenizer, config.model.ctx_len)]

    return make_finetuning_task(config, tokenizer, read_split(read, config.data, config.trainer.seed))


def make_finetuning_task(
    config: FinetuneConfig, tokenizer: Tokenizer, split: Split[Any]
) -> ConversationTask | PreferenceTask:
    """Return the task of a run whose data were read.

    Args:
        config: the settings of the run.
        tokenizer: the model's.
        split: conversations, or pairs where there is a section ``preference``.
    """
    kind = ConversationTask if config.preference is None else PreferenceTask
    return kind(config, tokenizer, split)
