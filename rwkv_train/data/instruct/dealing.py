"""Which row each lane of a run reads in each step: a pure function of the data, the seed and the step.

A step reads one row in each of ``global_batch_size`` lanes. Conversations come in the order of
:class:`~rwkv_train.data.instruct.samples.ConversationOrder` and are packed a window at a time, windows of an epoch of
all datasets being about equally large. A lane that has read its chain of rows to the end takes the next one. So the
rows of a long conversation are read by one lane in steps that follow each other, and its state can be carried.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rwkv_train.data.instruct.rows import Chain, Part, Row, pack
from rwkv_train.data.instruct.samples import ConversationOrder

WINDOW = 4096
"""Most conversations that are packed together: enough to fill rows well, and little work at a time."""

_KEPT_STEPS = 4  # a loader may be a little ahead of the step whose tokens are counted


class DealtRow(NamedTuple):
    """What a lane reads in one step. The conversations of its parts are numbers of samples in the run."""

    row: Row
    goes_on_next: bool
    """Whether the lane's next row begins where this one ends, in the same conversation."""


class DealtStep(NamedTuple):
    """One step of all lanes."""

    rows: tuple[DealtRow, ...]
    """By lane."""
    n_tokens: tuple[int, ...]
    """Positions read from each dataset, from the beginning of the run to the end of this step."""


class Dealer:
    """Deals rows to lanes.

    Args:
        lengths: positions of each conversation (``n_inputs``), by dataset.
        order: which conversation comes when.
        ctx_len: positions of a row.
        n_lanes: rows in a step.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], order: ConversationOrder, ctx_len: int, n_lanes: int
    ) -> None:
        self._lengths = lengths
        self._order = order
        self._ctx_len = ctx_len
        self._n_lanes = n_lanes
        self._epoch = sum(map(len, lengths))
        self._restart()

    def step(self, number: int) -> DealtStep:
        """Return what the lanes read in a step, from 0. Going on from the last step asked for is fast."""
        if number in self._kept:
            return self._kept[number]
        if number < self._n_dealt:
            self._restart()
        while self._n_dealt <= number:
            dealt = self._deal()
        return dealt

    def n_steps(self, epochs: float) -> int:
        """Return the first step by whose end that part of the conversations, in their order, has been read whole."""
        wanted = math.ceil(epochs * self._epoch)
        dealer = Dealer(self._lengths, self._order, self._ctx_len, self._n_lanes)
        left = {*range(wanted)}
        while left:
            for dealt in dealer.step(dealer._n_dealt).rows:
                parts = dealt.row.parts
                left.difference_update(
                    part.conversation for part in (parts[:-1] if dealt.goes_on_next else parts)
                )
        return dealer._n_dealt

    def _restart(self) -> None:
        self._chains = self._make_chains()
        self._lanes: list[Iterator[DealtRow]] = [iter(()) for _ in range(self._n_lanes)]
        self._n_dealt = 0
        self._n_tokens = [0] * len(self._lengths)
        self._kept: OrderedDict[int, DealtStep] = OrderedDict()

    def _deal(self) -> DealtStep:
        rows = []
        for lane in range(self._n_lanes):
            dealt = next(self._lanes[lane], None)
            if dealt is None:
                self._lanes[lane] = _rows_of(next(self._chains))
                dealt = next(self._lanes[lane])
            rows.append(dealt)
            for sample, start, stop in dealt.row.parts:
                self._n_tokens[self._order.locate(sample)[0]] += stop - start
        step = DealtStep(tuple(rows), tuple(self._n_tokens))
        self._kept[self._n_dealt] = step
        if len(self._kept) > _KEPT_STEPS:
            self._kept.popitem(last=False)
        self._n_dealt += 1
        return step

    def _make_chains(self) -> Iterator[Chain]:
        n_windows = -(-self._epoch // WINDOW)
        number = 0
        while True:
            epoch, window = divmod(number, n_windows)
            first, end = (epoch * self._epoch + self._epoch * w // n_windows for w in (window, window + 1))
            places = (self._order.locate(sample) for sample in range(first, end))
            for chain in pack([self._lengths[dataset][place] for dataset, place in places], self._ctx_len):
                yield tuple(_numbered(row, first) for row in chain)
            number += 1


def _numbered(row: Row, first: int) -> Row:
    """Name the conversations of a window by their samples."""
    return Row(tuple(Part(first + part.conversation, part.start, part.stop) for part in row.parts))


def _rows_of(chain: Chain) -> Iterator[DealtRow]:
    for number, row in enumerate(chain, start=1):
        yield DealtRow(row, number < len(chain))
