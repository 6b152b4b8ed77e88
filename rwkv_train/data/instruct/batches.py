"""Micro-batches of conversations."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.dealing import Dealer, DealtRow
from rwkv_train.data.instruct.rows import FilledPairRow, FilledRow, fill_row
from rwkv_train.data.instruct.samples import ConversationOrder
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import Carry, Drawn, MicroBatch, Position


class Sample(Protocol):
    """A conversation, or a pair of them."""

    @property
    def n_inputs(self) -> int:
        """Positions that the model reads."""
        ...


SampleT = TypeVar("SampleT", bound=Sample)


class InstructSamples(Generic[SampleT]):
    """The conversations of a run, or the pairs of them, by their number in it.

    Args:
        datasets: those of each dataset, in the order of ``data.datasets``.
        hashes: of what is in each dataset.
        config: the settings of the run.
    """

    def __init__(
        self, datasets: Sequence[Sequence[SampleT]], hashes: Sequence[str], config: FinetuneConfig
    ) -> None:
        self.datasets = datasets
        """All of them."""
        self._hashes = hashes
        self._names = [dataset.name for dataset in config.data.datasets]
        self._weights = [dataset.weight for dataset in config.data.datasets]
        self._n_lanes = config.trainer.global_batch_size
        self._order = ConversationOrder([*map(len, datasets)], self._weights, config.trainer.seed)
        lengths = [[sample.n_inputs for sample in dataset] for dataset in datasets]
        self._sizes = [sum(dataset) for dataset in lengths]
        self.dealer = Dealer(lengths, self._order, config.model.ctx_len, self._n_lanes)
        """Says who reads what when."""

    def __getitem__(self, sample: int) -> SampleT:
        dataset, number = self.locate(sample)
        return self.datasets[dataset][number]

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the dataset of a sample and its place there."""
        return self._order.locate(sample)

    @property
    def identity(self) -> dict[str, object]:
        """The weight, number and hash of the conversations of each dataset."""
        parts = zip(self._weights, self.datasets, self._hashes, strict=True)
        return {
            "conversations": [
                {"weight": weight, "conversations": len(dataset), "sha256": sha256}
                for weight, dataset, sha256 in parts
            ]
        }

    def drawn(self, n_samples: int) -> tuple[Drawn, ...]:
        """Return what the first ``n_samples`` rows took from each of several datasets; nothing where there is one."""
        if len(self.datasets) == 1:
            return ()
        n_tokens: Sequence[int] = [0] * len(self.datasets)
        if n_samples:
            n_tokens = self.dealer.step(n_samples // self._n_lanes - 1).n_tokens
        parts = zip(self._names, n_tokens, self._sizes, strict=True)
        return tuple(Drawn(name, tokens, tokens / size) for name, tokens, size in parts)


def hash_of(conversations: Iterable[TokenizedConversation]) -> str:
    """Return the SHA-256 of the tokens of conversations and of what is learned of them."""
    sha256 = hashlib.sha256()
    for conversation in conversations:
        sha256.update(len(conversation.tokens).to_bytes(8, "little"))
        sha256.update(np.ascontiguousarray(conversation.tokens, "<u4").tobytes())
        sha256.update(np.packbits(conversation.is_learned).tobytes())
    return sha256.hexdigest()


class LaneOrder(Sequence[tuple[int, range]]):
    """The step, and the lanes that a process reads in it, of each of its micro-batches.

    Args:
        config: the settings of the run.
        rank: number of the process.
        start: where the run stands.
        n_steps: steps of the whole run.
    """

    def __init__(self, config: FinetuneConfig, rank: int, start: Position, n_steps: int) -> None:
        self._trainer = config.trainer
        self._rank = rank
        self._first_step = start.first_sample(config) // config.trainer.global_batch_size
        self._length = (n_steps - start.step) * config.trainer.accumulation

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, range]:  # type: ignore[override]  # no slices
        if not 0 <= index < self._length:
            raise IndexError(index)
        trainer = self._trainer
        step, micro_batch = divmod(index, trainer.accumulation)
        first = (micro_batch * trainer.world_size + self._rank) * trainer.micro_batch_size
        return self._first_step + step, range(first, first + trainer.micro_batch_size)


class ConversationBatches(Dataset[MicroBatch]):
    """The micro-batches that one process computes from a position to the end of the run.

    Step s reads a row in each lane. A lane is read by one process as long as their number does not change.

    Args:
        samples: the conversations.
        config: the settings of the run.
        rank: number of this process.
        start: where the run stands.
        n_steps: steps of the whole run.
    """

    def __init__(
        self,
        samples: InstructSamples[TokenizedConversation],
        config: FinetuneConfig,
        rank: int,
        start: Position,
        n_steps: int,
    ) -> None:
        self._samples = samples
        self._ctx_len = config.model.ctx_len
        self._lanes = LaneOrder(config, rank, start, n_steps)

    def __len__(self) -> int:
        return len(self._lanes)

    def __getitem__(self, index: int) -> MicroBatch:
        step, lanes = self._lanes[index]
        rows = self._samples.dealer.step(step).rows
        return join_rows(
            [fill_row(rows[lane].row, self._samples, self._ctx_len) for lane in lanes],
            step_targets=sum(self._n_targets(dealt) for dealt in rows),
            first_sample=step * len(rows) + lanes[0],
            carry=carry_of([rows[lane] for lane in lanes], lanes[0], self._ctx_len),
        )

    def _n_targets(self, dealt: DealtRow) -> int:
        return sum(
            int(np.count_nonzero(self._samples[sample].is_learned[start + 1 : stop + 1]))
            for sample, start, stop in dealt.row.parts
        )


def join_rows(
    filled: Sequence[FilledRow | FilledPairRow],
    step_targets: int,
    first_sample: int = 0,
    carry: Carry | None = None,
) -> MicroBatch:
    """Put rows one after another into one packed micro-batch.

    Empty sequences at the end make their number a power of two, so that a compiled model meets few different sizes.
    A step in which nothing is learned counts as one target, so that its loss is 0 and not 0 / 0.
    """
    starts: list[int] = []
    length = 0
    for row in filled:
        starts += (row.cu_seqlens[:-1] + length).tolist()
        length += len(row.tokens)
    cu_seqlens = torch.full(((1 << (len(starts) - 1).bit_length()) + 1,), length, dtype=torch.int64)
    cu_seqlens[: len(starts)] = torch.tensor(starts)
    return MicroBatch(
        torch.from_numpy(np.concatenate([row.tokens for row in filled])).unsqueeze(0),
        torch.from_numpy(np.concatenate([row.targets for row in filled])).unsqueeze(0),
        max(1, step_targets),
        first_sample,
        cu_seqlens,
        carry,
    )


def carry_of(dealt: Sequence[DealtRow], first_lane: int, ctx_len: int) -> Carry | None:
    """Return which sequences of joined rows go on from the step before, and which go on in the next one."""
    comes: list[tuple[int, int]] = []
    goes: list[tuple[int, int]] = []
    first = 0  # number of the row's first sequence
    for lane, (row, goes_on_next) in enumerate(dealt, start=first_lane):
        if row.goes_on:
            comes.append((lane, first))
        if goes_on_next:  # the row is full, so its last part is its last sequence
            goes.append((lane, first + len(row.parts) - 1))
        first += len(row.parts) + (row.n_tokens < ctx_len)  # the filling is a sequence, too
    return Carry(tuple(comes), tuple(goes)) if comes or goes else None
