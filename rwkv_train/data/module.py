"""Training samples for Lightning: which sample a process reads when is a pure function of the step."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv_train.config.train import TrainConfig
from rwkv_train.data.sampler import slot_of_sample
from rwkv_train.data.stored import Corpus
from rwkv_train.errors import DataError

Sample = tuple[Tensor, Tensor]
"""Tokens and the tokens to predict, both ``[T]`` int64."""


def n_slots(corpus: Corpus, ctx_len: int) -> int:
    """Return how many samples of ``ctx_len`` tokens (and one more to predict) a corpus holds."""
    return (corpus.tokens.n_tokens - 1) // ctx_len


def sample_number(position: int, rank: int, config: TrainConfig, start_step: int) -> int:
    """Return the global number of the sample that a process reads at ``position``.

    Step s takes the samples ``s * global_batch_size`` and following, whatever the number of processes.

    Args:
        position: number of the sample among those that this process reads, from 0 at ``start_step``.
        rank: number of the process.
        config: the settings of the run.
        start_step: steps that are done.
    """
    trainer = config.trainer
    micro_batch, lane = divmod(position, trainer.micro_batch_size)
    first = start_step * trainer.global_batch_size
    return first + (micro_batch * trainer.world_size + rank) * trainer.micro_batch_size + lane


class TokenSamples(Dataset[Sample]):
    """The samples that one process reads from ``start_step`` to the end of the run.

    Args:
        corpus: the tokens, memory-mapped.
        config: the settings of the run.
        rank: number of this process.
        start_step: steps that are done.
        n_steps: steps of the whole run.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig, rank: int, start_step: int, n_steps: int) -> None:
        self._tokens = corpus.tokens.tokens
        self._prefix = corpus.prefix
        self._n_slots = n_slots(corpus, config.model.ctx_len)
        self._config = config
        self._rank = rank
        self._start_step = start_step
        trainer = config.trainer
        self._length = (n_steps - start_step) * trainer.accumulation * trainer.micro_batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Sample:
        config = self._config
        sample = sample_number(position, self._rank, config, self._start_step)
        slot = int(slot_of_sample(sample, self._n_slots, config.trainer.seed, config.data.order))
        start = slot * config.model.ctx_len
        window = self._tokens[start : start + config.model.ctx_len + 1].astype(np.int64)
        # A large foreign corpus was looked at in parts only; on a GPU a wrong id would crash the device.
        if window.max() >= config.model.vocab_size or window.min() < 0:
            raise DataError(
                f"{self._prefix}: near token {start} there is an id outside of the model's 0 to "
                f"{config.model.vocab_size - 1}; is this another tokenizer's corpus?"
            )
        tokens = torch.from_numpy(window)
        return tokens[:-1], tokens[1:]


class PretrainData(LightningDataModule):
    """The training samples of a run; Lightning's own distributed sampler stays off."""

    def __init__(self, corpus: Corpus, config: TrainConfig, start_step: int, n_steps: int) -> None:
        super().__init__()
        self._corpus = corpus
        self._config = config
        self._start_step = start_step
        self._n_steps = n_steps

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return this process' micro-batches in order."""
        assert self.trainer is not None
        samples = TokenSamples(
            self._corpus, self._config, self.trainer.global_rank, self._start_step, self._n_steps
        )
        # No workers: reading a memory-mapped slice takes microseconds.
        return DataLoader(samples, batch_size=self._config.trainer.micro_batch_size)
