"""Tokens of a conversation, each learned or only read.

**Where the text is cut.** A run of text that is only read and a run that is learned are tokenized each by itself. That
is what inference sees: there the prompt is tokenized, and the answer's tokens follow, so no token can lie across the
place where the answer begins. Nor can a mask cut a token in two. With the template "g1" and the World tokenizer the
result is also that of the whole text: no World token holds a letter after a blank line, or a space after a colon.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.config.instruct import LearnConfig
from rwkv_train.data.instruct.conversation import Conversation, learned_messages
from rwkv_train.data.instruct.templates import ChatTemplate
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.tokenizers.base import TokenArray, token_dtype

IGNORED = -100
"""The target at a position whose prediction costs nothing."""


class Run(NamedTuple):
    """Text that is tokenized by itself."""

    text: str
    is_learned: bool


class TokenizedConversation(NamedTuple):
    """A conversation as the model gets it: the end-of-document token, the text, the end-of-document token."""

    where: str
    tokens: TokenArray
    """``[T + 1]``, both ends included."""
    is_learned: npt.NDArray[np.bool_]
    """``[T + 1]``: whether the loss is taken where this token is to be predicted; false for the first one."""

    @property
    def n_inputs(self) -> int:
        """Positions that the model reads (T)."""
        return len(self.tokens) - 1

    @property
    def n_learned(self) -> int:
        """Tokens that are learned."""
        return int(self.is_learned.sum())

    def inputs_and_targets(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return what is read and what is to be predicted, ``[T]`` both; ``IGNORED`` where it is not learned."""
        tokens = self.tokens.astype(np.int64)
        return tokens[:-1], np.where(self.is_learned[1:], tokens[1:], IGNORED)


def runs_of(
    conversation: Conversation, template: ChatTemplate, learn: Literal["assistant", "all"] | LearnConfig
) -> list[Run]:
    """Return the text of a conversation, cut where learned text begins or ends.

    An assistant message that is learned is so from the end of the prompt that inference gives, with the end of its
    turn; a message of another role with its heading. Under ``"all"`` everything is, but for messages that a record
    itself takes out: in such a record the headings of answers are only read.

    Raises:
        DataError: nothing is learned, or the template cannot write it.
    """
    if conversation.text is not None:
        return [Run(conversation.text, is_learned=True)]
    is_learned = learned_messages(conversation, learn)
    is_marked = any(message.learn is not None for message in conversation.messages)
    learns_headings = learn == "all" and not is_marked
    roles = [message.role for message in conversation.messages]
    parts = [
        (
            piece.text,
            learns_headings
            or (is_learned[piece.message] and (piece.is_answer or roles[piece.message] != "assistant")),
        )
        for piece in template.pieces(conversation.messages)
    ]
    runs = [
        Run("".join(text for text, _ in group), learned)
        for learned, group in groupby(parts, key=lambda part: part[1])
    ]
    if not any(run.is_learned for run in runs):
        raise DataError(
            f"there is nothing to learn: the template {template.name} writes nothing for what is learned"
        )
    return runs


def tokenize(where: str, runs: Sequence[Run], tokenizer: Tokenizer) -> TokenizedConversation:
    """Tokenize each run by itself; the end-of-document token after the last one is learned if that one is.

    Args:
        where: the conversation's place.
        runs: its text.
        tokenizer: the model's.
    """
    end = np.asarray([tokenizer.end_of_document], token_dtype(tokenizer.vocab_size))
    pieces = [end, *tokenizer.encode_arrays([run.text for run in runs]), end]
    masks = [False, *(run.is_learned for run in runs), runs[-1].is_learned]
    return TokenizedConversation(
        where,
        np.concatenate(pieces),
        np.repeat(np.asarray(masks), [len(piece) for piece in pieces]),
    )


def is_cut_as_whole(conversation: TokenizedConversation, runs: Sequence[Run], tokenizer: Tokenizer) -> bool:
    """Say whether the whole text gives the same tokens as its runs do."""
    whole = tokenizer.encode("".join(run.text for run in runs))
    return np.array_equal(conversation.tokens[1:-1], whole)
