"""Training batches for Lightning: which sample a process reads when is a pure function of the step."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv_train.config.run import RunConfig
from rwkv_train.config.train import TrainConfig
from rwkv_train.data import sampler
from rwkv_train.data.packing import cut_at_documents
from rwkv_train.data.sampler import seed_of_corpus, slot_of_sample
from rwkv_train.data.stored import Corpus
from rwkv_train.errors import DataError


class Carry(NamedTuple):
    """Sequences of a packed micro-batch that are segments of longer ones, read by one lane in steps in a row.

    A lane is a place in the global batch, whichever process reads it.
    """

    comes: tuple[tuple[int, int], ...]
    """Lane and sequence of each that begins with the state that the lane's last one ended with in the step before."""
    goes: tuple[tuple[int, int], ...]
    """Lane and sequence of each that the lane goes on with in the next step."""


class PairSequences(NamedTuple):
    """Which sequences of a packed micro-batch are the answers of its P preference pairs."""

    chosen: Tensor
    """Numbers of sequences, ``[P]`` int64."""
    rejected: Tensor
    """Likewise."""
    reference: tuple[Tensor, Tensor] | None
    """Log-probabilities of both under the model before the run, ``[P]`` float32; ``None`` where none are needed."""


class MicroBatch(NamedTuple):
    """What a process computes at once."""

    tokens: Tensor
    """``[B, T]`` int64; packed: ``[1, B * T]``, one sample after another."""
    targets: Tensor
    """The tokens to predict, of the same shape; -100 where none is."""
    step_targets: int
    """Tokens to predict (of pairs: pairs) in the whole step, over all processes and accumulated micro-batches."""
    first_sample: int
    """Number of its first sample in the run."""
    cu_seqlens: Tensor | None = None
    """Where a sequence begins in a packed micro-batch, ``[S + 1]`` int64; see :func:`cut_at_documents`."""
    carry: Carry | None = None
    """Which of them go on from the step before or in the next one; ``None``: each is whole."""
    pairs: PairSequences | None = None
    """Which of them are answers to one prompt; ``None``: they are no pairs."""


class Drawn(NamedTuple):
    """What a run has taken from one of its corpora."""

    name: str
    """What the corpus is called among them."""
    tokens: int
    epochs: float
    """Passes over it."""


class DataSource(Protocol):
    """What a run learns from."""

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed run recognises its data by: JSON's types."""
        ...

    def drawn(self, n_samples: int) -> tuple[Drawn, ...]:
        """Return what the first ``n_samples`` took from each of several parts; nothing where there is one."""
        ...


class Samples(DataSource, Protocol):
    """Training samples by their number in a run."""

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of a sample, both ``[T]`` int64."""
        ...

    def n_targets(self, first: int, count: int) -> int:
        """Return how many targets, those of -100 aside, ``count`` samples from ``first`` on have together."""
        ...


class CorpusSamples:
    """Windows of ``ctx_len`` tokens of a corpus.

    Args:
        corpus: the tokens, memory-mapped.
        config: the settings of the run.
        index: place of the corpus among those of the run; each has an order of its own.

    Raises:
        DataError: the corpus is too small for the order.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig, index: int = 0) -> None:
        self._corpus = corpus
        self._tokens = corpus.tokens.tokens
        self._prefix = corpus.prefix
        self.n_slots = n_slots(corpus, config)
        """Samples in an epoch."""
        self._config = config
        self._seed = seed_of_corpus(config.trainer.seed, index)

    @property
    def identity(self) -> dict[str, object]:
        """That of the corpus."""
        return self._corpus.identify()

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of a sample, both ``[T]`` int64."""
        config = self._config
        slot = int(slot_of_sample(sample, self.n_slots, self._seed, config.data.order))
        start = slot * config.model.ctx_len
        window = self._tokens[start : start + config.model.ctx_len + 1].astype(np.int64)
        # A large foreign corpus was looked at in parts only; on a GPU a wrong id would crash the device.
        if window.max() >= config.model.vocab_size or window.min() < 0:
            raise DataError(
                f"{self._prefix}.bin: near token {start} there is an id outside of the model's 0 to "
                f"{config.model.vocab_size - 1}; is this another tokenizer's corpus, or was the file changed?"
            )
        tokens = torch.from_numpy(window)
        return tokens[:-1], tokens[1:]

    def n_targets(self, first: int, count: int) -> int:
        """Return the targets of ``count`` samples: every token has one."""
        return count * self._config.model.ctx_len

    def drawn(self, n_samples: int) -> tuple[Drawn, ...]:
        """Return nothing: there is one corpus."""
        return ()


class Position(NamedTuple):
    """Where a run stands in its data."""

    step: int
    """Steps that are done."""
    skipped: int = 0
    """Samples that were passed over, when the run went back to a checkpoint and on with other data."""

    def first_sample(self, config: RunConfig) -> int:
        """Return the number of the first sample of the next step."""
        return self.skipped + self.step * config.trainer.global_batch_size


def n_slots(corpus: Corpus, config: TrainConfig) -> int:
    """Return how many samples one pass over a corpus has.

    Raises:
        DataError: the corpus is too small for the order.
    """
    try:
        return sampler.n_slots(corpus.tokens.n_tokens, config.model.ctx_len, config.data.order)
    except ValueError as error:
        raise DataError(f"{corpus.prefix}: {error}") from error


class MicroBatches(Dataset[MicroBatch]):
    """The micro-batches that one process computes from a position to the end of the run.

    Step s takes ``global_batch_size`` samples in a row, whatever the number of processes.

    Args:
        samples: where they come from.
        config: the settings of the run.
        rank: number of this process.
        start: where the run stands.
        n_steps: steps of the whole run.
        end_of_document: the token after which a sequence of its own begins; ``None``: none does.
    """

    def __init__(
        self,
        samples: Samples,
        config: TrainConfig,
        rank: int,
        start: Position,
        n_steps: int,
        end_of_document: int | None = None,
    ) -> None:
        self._samples = samples
        self._trainer = config.trainer
        self._rank = rank
        self._end_of_document = end_of_document
        self._first_sample = start.first_sample(config)
        self._length = (n_steps - start.step) * config.trainer.accumulation

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> MicroBatch:
        trainer = self._trainer
        step, micro_batch = divmod(index, trainer.accumulation)
        step_first = self._first_sample + step * trainer.global_batch_size
        first = step_first + (micro_batch * trainer.world_size + self._rank) * trainer.micro_batch_size
        pairs = [self._samples.read(sample) for sample in range(first, first + trainer.micro_batch_size)]
        tokens, targets = (torch.stack(part) for part in zip(*pairs, strict=True))
        step_targets = self._samples.n_targets(step_first, trainer.global_batch_size)
        if self._end_of_document is None:
            return MicroBatch(tokens, targets, step_targets, first)
        cu_seqlens = cut_at_documents(tokens, self._end_of_document)
        return MicroBatch(tokens.view(1, -1), targets.view(1, -1), step_targets, first, cu_seqlens)


class RunData(LightningDataModule):
    """The training batches of a run; Lightning's own distributed sampler stays off.

    Args:
        batches: gives the micro-batches of a process, by its number.
    """

    def __init__(self, batches: Callable[[int], Dataset[MicroBatch]]) -> None:
        super().__init__()
        self._batches = batches

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Return this process' micro-batches in order."""
        assert self.trainer is not None
        # No workers: reading a memory-mapped slice takes microseconds, and a stream is one. An item is a whole batch.
        return DataLoader(self._batches(self.trainer.global_rank), batch_size=None)
