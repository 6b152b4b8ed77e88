"""Rows of ``ctx_len`` tokens in which conversations stand one after another, each with a state of its own.

What fits into a row is never divided. A longer conversation goes through whole rows in turn; what is left of it
begins the next row, where short ones may follow. Its rows are a chain: each begins with the state that the last
sequence of the row before ended with. Pairs of answers stand whole in a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.tokens import IGNORED, TokenizedConversation


class Part(NamedTuple):
    """Positions of a conversation that stand in one row, from ``start`` to ``stop - 1``."""

    conversation: int
    start: int
    stop: int


class Row(NamedTuple):
    """What stands in one row, in this order."""

    parts: tuple[Part, ...]

    @property
    def n_tokens(self) -> int:
        """Positions that are used."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def goes_on(self) -> bool:
        """Whether its first sequence begins with the last state of the row before in its chain."""
        return self.parts[0].start > 0


class FilledRow(NamedTuple):
    """A row as the model gets it."""

    tokens: npt.NDArray[np.int64]
    """``[ctx_len]``; end-of-document tokens fill the end."""
    targets: npt.NDArray[np.int64]
    """``[ctx_len]``; ``IGNORED`` where nothing is learned, and in the filling."""
    cu_seqlens: npt.NDArray[np.int64]
    """Where sequences begin, ``[S + 1]`` from 0 to ctx_len; the filling is one of its own."""


class Conversations(Protocol):
    """Conversations by number."""

    def __getitem__(self, number: int, /) -> TokenizedConversation: ...


Chain = tuple[Row, ...]
"""Rows that come one after another; one, unless a conversation is longer than a row."""


def pack(lengths: Sequence[int], ctx_len: int) -> list[Chain]:
    """Put conversations into few rows.

    Best fit decreasing: the longest first, each into the row with the least room in which it fits, else into a new one.
    Equal lengths keep their order, so the result is a function of the lengths alone.

    Args:
        lengths: positions of each conversation (``n_inputs``), at least 1.
        ctx_len: positions of a row.

    Returns:
        The chains, in the order of the first conversation of each. Every position of every conversation stands in
        exactly one row.
    """
    chains: list[list[list[Part]]] = []
    rooms: list[tuple[int, int]] = []  # (positions left in its last row, chain), sorted
    for conversation in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[conversation]
        place = bisect_left(rooms, (length, -1))
        if length <= ctx_len and place < len(rooms):
            room, chain = rooms.pop(place)
            chains[chain][-1].append(Part(conversation, 0, length))
        else:
            starts = range(0, length, ctx_len)
            chains.append([[Part(conversation, start, min(start + ctx_len, length))] for start in starts])
            room, chain = ctx_len * len(starts), len(chains) - 1
        if room > length:
            insort(rooms, (room - length, chain))
    packed = [tuple(Row(tuple(parts)) for parts in chain) for chain in chains]
    return sorted(packed, key=lambda chain: min(part.conversation for row in chain for part in row.parts))


def fill_row(row: Row, conversations: Conversations, ctx_len: int) -> FilledRow:
    """Return the tokens of a row.

    Args:
        row: a row of :func:`pack`, for these conversations and this ``ctx_len``.
        conversations: those of its parts, by the numbers there.
        ctx_len: positions of the row.
    """
    end = conversations[row.parts[0].conversation].tokens[0]  # every conversation begins with it
    tokens = np.full(ctx_len, end, np.int64)
    targets = np.full(ctx_len, IGNORED, np.int64)
    starts = [0]
    for conversation, start, stop in row.parts:
        inputs, wanted = conversations[conversation].inputs_and_targets()
        here = slice(starts[-1], starts[-1] + stop - start)
        tokens[here], targets[here] = inputs[start:stop], wanted[start:stop]
        starts.append(here.stop)
    if starts[-1] < ctx_len:
        starts.append(ctx_len)
    return FilledRow(tokens, targets, np.asarray(starts, np.int64))


class FilledPairRow(NamedTuple):
    """A row of pairs as the model gets it."""

    tokens: npt.NDArray[np.int64]
    """``[ctx_len]``; end-of-document tokens fill the end."""
    targets: npt.NDArray[np.int64]
    """``[ctx_len]``; ``IGNORED`` where nothing is learned, and in the filling."""
    cu_seqlens: npt.NDArray[np.int64]
    """Where sequences begin, ``[S + 1]`` from 0 to ctx_len; the filling is one of its own."""
    chosen: npt.NDArray[np.int64]
    """Which sequence is the chosen answer of each of the row's pairs, ``[P]``."""
    rejected: npt.NDArray[np.int64]
    """Likewise the rejected one."""


def pack_pairs(lengths: Sequence[int], ctx_len: int) -> list[tuple[int, ...]]:
    """Put whole pairs into few rows, as :func:`pack` does.

    Args:
        lengths: positions of each pair (``n_inputs``), at least 1.
        ctx_len: positions of a row.

    Returns:
        The numbers of the pairs of each row.

    Raises:
        ValueError: a pair is longer than a row.
    """
    if lengths and max(lengths) > ctx_len:
        raise ValueError(f"a pair of {max(lengths)} tokens does not stand in a row of {ctx_len}")
    return [tuple(part.conversation for part in row.parts) for (row,) in pack(lengths, ctx_len)]


def fill_pair_row(pairs: Sequence[PreferencePair], ctx_len: int) -> FilledPairRow:
    """Return the tokens of a row: of each pair the chosen conversation, then the rejected one.

    Args:
        pairs: those of the row, at least one, in the order that they are to stand in.
        ctx_len: positions of the row; no less than the pairs have.
    """
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    row = Row(tuple(Part(place, 0, side.n_inputs) for place, side in enumerate(sides)))
    chosen = 2 * np.arange(len(pairs))
    return FilledPairRow(*fill_row(row, sides, ctx_len), chosen, chosen + 1)
