"""How a document is cut into the sequences that a model reads: whole, or in windows as lm-evaluation-harness does."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.evaluation.scoring import Sequence
from rwkv_train.models.lm import NO_TARGET
from rwkv_train.tokenizers.base import TokenArray


class Piece(NamedTuple):
    """A sequence that scores a part of a document."""

    sequence: Sequence
    start: int
    """Position in the document of the first token that is scored; the others follow it without a gap."""


def whole(tokens: TokenArray, prefix_token: int | None) -> Iterator[Piece]:
    """Yield a document as one sequence, whose state is carried from its first to its last token.

    Args:
        tokens: ids of the document, ``[n]``.
        prefix_token: what is read before it; ``None``: nothing, then its first token is not scored.
    """
    text, start = _with_prefix(tokens, prefix_token)
    yield Piece(Sequence(inputs=text[:-1], targets=text[1:]), start)


def streamed(tokens: TokenArray, prefix_token: int) -> Iterator[Piece]:
    """Yield a document as a part of a stream: its last token is read too, but the prefix of the next is not scored."""
    inputs, _ = _with_prefix(tokens, prefix_token)
    yield Piece(Sequence(inputs, targets=np.append(inputs[1:], np.int32(NO_TARGET))), 0)


def rolling_windows(tokens: TokenArray, prefix_token: int | None, window: int) -> Iterator[Piece]:
    """Yield the windows of a document, each from a state of zero; together they score every token once.

    The first reads the prefix and predicts ``window`` tokens; each further one reads the token before its own, as the
    only context. The last is shifted back to be as long as the others: what it so reads again is context.

    Args:
        tokens: ids of the document, ``[n]``.
        prefix_token: what is read before it; ``None``: nothing, then its first token is not scored.
        window: tokens that are read in one window.

    Source:
        lm-evaluation-harness, ``get_rolling_token_windows`` with ``context_len=1``.
    """
    text, start = _with_prefix(tokens, prefix_token)
    n_targets = len(text) - 1
    for first in range(0, max(n_targets, 1), window):  # one without targets too
        end = min(first + window, n_targets)
        begin = max(0, end - window)
        targets = text[begin + 1 : end + 1]
        if begin < first:
            targets = targets.copy()
            targets[: first - begin] = NO_TARGET
        yield Piece(Sequence(inputs=text[begin:end], targets=targets), start + first)


def _with_prefix(tokens: TokenArray, prefix_token: int | None) -> tuple[npt.NDArray[np.int32], int]:
    """Return the tokens after their prefix, and the position of the first one that is predicted."""
    if prefix_token is None:  # the first token takes the place of the prefix
        return tokens.astype(np.int32), 1
    text = np.empty(len(tokens) + 1, np.int32)
    text[0] = prefix_token
    text[1:] = tokens
    return text, 0
