"""Micro-batches of conversations."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.dealing import Dealer, DealtRow
from rwkv_train.data.instruct.rows import FilledRow, fill_row
from rwkv_train.data.instruct.samples import ConversationOrder
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import Carry, Drawn, MicroBatch, Position


class ConversationSamples:
    """The conversations of a run, of which each sample is one.

    Args:
        datasets: the conversations of each dataset, in the order of ``data.datasets``.
        config: the settings of the run.
    """

    def __init__(self, datasets: Sequence[Sequence[TokenizedConversation]], config: FinetuneConfig) -> None:
        self._datasets = datasets
        self._names = [dataset.path for dataset in config.data.datasets]
        self._weights = [dataset.weight for dataset in config.data.datasets]
        self._n_lanes = config.trainer.global_batch_size
        self._order = ConversationOrder([*map(len, datasets)], self._weights, config.trainer.seed)
        lengths = [[conversation.n_inputs for conversation in dataset] for dataset in datasets]
        self.dealer = Dealer(lengths, self._order, config.model.ctx_len, self._n_lanes)
        """Says who reads what when."""
        self._hashes = [hash_of(dataset) for dataset in datasets]

    def __getitem__(self, sample: int) -> TokenizedConversation:
        dataset, number = self._order.locate(sample)
        return self._datasets[dataset][number]

    @property
    def identity(self) -> dict[str, object]:
        """The weight, number and hash of the conversations of each dataset."""
        parts = zip(self._weights, self._datasets, self._hashes, strict=True)
        return {
            "conversations": [
                {"weight": weight, "conversations": len(dataset), "sha256": sha256}
                for weight, dataset, sha256 in parts
            ]
        }

    def drawn(self, n_samples: int) -> tuple[Drawn, ...]:
        """Return what the first ``n_samples`` rows took from each of several datasets; nothing where there is one."""
        if len(self._datasets) == 1 or n_samples == 0:
            return tuple(Drawn(name, 0, 0.0) for name in self._names) if len(self._names) > 1 else ()
        read = self.dealer.step(n_samples // self._n_lanes - 1).n_tokens
        sizes = [sum(conversation.n_inputs for conversation in dataset) for dataset in self._datasets]
        return tuple(
            Drawn(name, tokens, tokens / size)
            for name, tokens, size in zip(self._names, read, sizes, strict=True)
        )


def hash_of(conversations: Sequence[TokenizedConversation]) -> str:
    """Return the SHA-256 of the tokens of conversations and of what is learned of them."""
    sha256 = hashlib.sha256()
    for conversation in conversations:
        sha256.update(len(conversation.tokens).to_bytes(8, "little"))
        sha256.update(np.ascontiguousarray(conversation.tokens, "<u4").tobytes())
        sha256.update(np.packbits(conversation.is_learned).tobytes())
    return sha256.hexdigest()


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
        self, samples: ConversationSamples, config: FinetuneConfig, rank: int, start: Position, n_steps: int
    ) -> None:
        self._samples = samples
        self._trainer = config.trainer
        self._ctx_len = config.model.ctx_len
        self._rank = rank
        self._first_step = start.first_sample(config) // config.trainer.global_batch_size
        self._length = (n_steps - start.step) * config.trainer.accumulation

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> MicroBatch:
        trainer = self._trainer
        step, micro_batch = divmod(index, trainer.accumulation)
        step += self._first_step
        first_lane = (micro_batch * trainer.world_size + self._rank) * trainer.micro_batch_size
        lanes = range(first_lane, first_lane + trainer.micro_batch_size)
        rows = self._samples.dealer.step(step).rows
        return join_rows(
            [fill_row(rows[lane].row, self._samples, self._ctx_len) for lane in lanes],
            step_targets=sum(self._n_targets(dealt) for dealt in rows),
            first_sample=step * trainer.global_batch_size + first_lane,
            carry=carry_of([rows[lane] for lane in lanes], first_lane, self._ctx_len),
        )

    def _n_targets(self, dealt: DealtRow) -> int:
        return sum(
            int(np.count_nonzero(self._samples[sample].is_learned[start + 1 : stop + 1]))
            for sample, start, stop in dealt.row.parts
        )


def join_rows(
    filled: Sequence[FilledRow], step_targets: int, first_sample: int = 0, carry: Carry | None = None
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
