"""The conversations of a run: those to learn from, and those held out."""

import random
from typing import NamedTuple

from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.data.instruct.reading import ReadDataset, read_conversations
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer


class ConversationData(NamedTuple):
    """What a run reads."""

    train: list[ReadDataset]
    """By dataset, in the order of the settings."""
    valid: dict[str, list[TokenizedConversation]]
    """Held-out conversations by the name of their dataset; empty where nothing is held out."""


def read_data(config: InstructDataConfig, tokenizer: Tokenizer, seed: int) -> ConversationData:
    """Read the conversations of a run.

    Args:
        config: which, and how.
        tokenizer: the model's.
        seed: chooses what ``valid_fraction`` holds out.

    Raises:
        DataError: as :func:`~rwkv_train.data.instruct.reading.read_conversations`; or a dataset is
            too small to be divided.
    """
    train = read_conversations(config, tokenizer)
    if config.valid is not None:
        read = read_conversations(config.model_copy(update={"datasets": config.valid}), tokenizer)
        return ConversationData(train, {one.dataset.path: one.conversations for one in read})
    if config.valid_fraction is None:
        return ConversationData(train, {})
    parts = [_divide(one, config.valid_fraction, seed) for one in train]
    return ConversationData(
        [part for part, _ in parts], {part.dataset.path: held_out for part, held_out in parts}
    )


def _divide(read: ReadDataset, fraction: float, seed: int) -> tuple[ReadDataset, list[TokenizedConversation]]:
    count = len(read.conversations)
    n_held_out = max(1, round(fraction * count))
    if n_held_out >= count:
        raise DataError(
            f"data.valid_fraction ({fraction:g}) leaves nothing to learn from in {read.dataset.path}, which has "
            f"{count} conversations; hold out less, or name a file in data.valid"
        )
    chosen = set(random.Random(f"held out {seed}").sample(range(count), n_held_out))
    kept = [one for number, one in enumerate(read.conversations) if number not in chosen]
    held_out = [read.conversations[number] for number in sorted(chosen)]
    return read._replace(conversations=kept), held_out
