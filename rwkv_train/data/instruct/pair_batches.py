"""Micro-batches of preference pairs."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.batches import InstructSamples, LaneOrder, join_rows
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.rows import FilledPairRow, fill_pair_row
from rwkv_train.data.module import MicroBatch, PairSequences, Position

Reference = tuple[Tensor, Tensor]
"""Log-probability of the chosen and of the rejected answer of each pair of a dataset, ``[P]`` float32."""


class PairBatches(Dataset[MicroBatch]):
    """The micro-batches of pairs that one process computes from a position to the end of the run.

    Args:
        samples: the pairs.
        reference: by dataset; ``None`` where the loss needs none.
        config: the settings of the run.
        rank: number of this process.
        start: where the run stands.
        n_steps: steps of the whole run.
    """

    def __init__(
        self,
        samples: InstructSamples[PreferencePair],
        reference: Sequence[Reference] | None,
        config: FinetuneConfig,
        rank: int,
        start: Position,
        n_steps: int,
    ) -> None:
        self._samples = samples
        self._reference = reference
        self._ctx_len = config.model.ctx_len
        self._lanes = LaneOrder(config, rank, start, n_steps)

    def __len__(self) -> int:
        return len(self._lanes)

    def __getitem__(self, index: int) -> MicroBatch:
        step, lanes = self._lanes[index]
        rows = self._samples.dealer.step(step).rows
        numbers = [[part.conversation for part in rows[lane].row.parts] for lane in lanes]
        reference = None
        if self._reference is not None:
            reference = self._reference_of([sample for row in numbers for sample in row], self._reference)
        return join_pairs(
            [fill_pair_row([self._samples[sample] for sample in row], self._ctx_len) for row in numbers],
            reference,
            n_pairs=sum(len(dealt.row.parts) for dealt in rows),
            first_sample=step * len(rows) + lanes[0],
        )

    def _reference_of(self, numbers: Sequence[int], reference: Sequence[Reference]) -> Reference:
        places = [self._samples.locate(sample) for sample in numbers]
        chosen, rejected = (
            torch.stack([reference[dataset][side][number] for dataset, number in places]) for side in (0, 1)
        )
        return chosen, rejected


def join_pairs(
    filled: Sequence[FilledPairRow], reference: Reference | None, *, n_pairs: int, first_sample: int = 0
) -> MicroBatch:
    """Put rows of pairs one after another into one packed micro-batch.

    Args:
        filled: the rows.
        reference: of their pairs, in their order.
        n_pairs: pairs in the whole step.
        first_sample: number of the first row in the run.
    """
    n_before = np.cumsum([0, *(len(row.cu_seqlens) - 1 for row in filled)])
    chosen, rejected = (
        torch.from_numpy(np.concatenate([side + n for side, n in zip(sides, n_before, strict=False)]))
        for sides in ([row.chosen for row in filled], [row.rejected for row in filled])
    )
    batch = join_rows(filled, n_pairs, first_sample)
    return batch._replace(pairs=PairSequences(chosen, rejected, reference))
