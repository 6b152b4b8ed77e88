"""What a model reads before a text whose continuation is measured."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_train.tokenizers import Tokenizer


class Prefix(StrEnum):
    """The conventions of published numbers; they differ by a few percent on small models."""

    END_OF_DOCUMENT = "end-of-document"
    """One end-of-document token, 0 in RWKV's vocabularies: as each document begins in training, and as RWKV-LM's own
    scripts evaluate."""
    NEWLINE = "newline"
    """The tokens of one line feed, encoded by themselves: as ChatRWKV's adapter to lm-evaluation-harness pads."""
    NONE = "none"
    """Nothing: as lm-evaluation-harness reads with transformers' models, unless told ``add_bos_token``. What has no
    text before it follows an end-of-document token all the same: a model must read something first."""


def prefix_tokens(prefix: Prefix, tokenizer: "Tokenizer", *, is_alone: bool) -> list[int]:
    """Return the tokens of a prefix.

    Args:
        prefix: the convention.
        tokenizer: the model's.
        is_alone: whether no token follows before what is measured; then there is one token at least.
    """
    if prefix is Prefix.END_OF_DOCUMENT:
        return [tokenizer.end_of_document]
    tokens = (
        tokenizer.encode("\n") if prefix is Prefix.NEWLINE else []
    )  # none too where white space is stripped
    return tokens or ([tokenizer.end_of_document] if is_alone else [])
