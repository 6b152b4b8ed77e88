"""Samples of a dataset that is tokenized while a run reads it; where it stands can be saved and gone back to.

Every process reads the whole stream and keeps its own samples, so their order does not depend on how many there are.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_train.config.train import TrainConfig
from rwkv_train.data.hub_dataset import DatasetState, Row, TextDataset, show
from rwkv_train.data.module import Drawn
from rwkv_train.data.sampler import random_number
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.tokenizers.base import TokenArray

logger = logging.getLogger(__name__)

_KEPT_STATES = 4  # Lightning reads a batch ahead, so a step ends when the next one's data are read already


class StreamState(NamedTuple):
    """Where a stream stands: all that the samples from here on depend on."""

    sample: int
    """Number of the next sample."""
    passes: int
    """How often the dataset was read to its end."""
    rows: int
    """Rows of it that were read since."""
    dataset: DatasetState | None
    """The dataset's own description of that place; ``None`` where the number of rows is enough."""
    rest: TokenArray
    """Tokens that were read and are in no sample yet, ``[n]`` int32."""
    buffer: tuple[TokenArray, ...]
    """Samples held back for shuffling, each ``[T + 1]`` int32."""

    def to_json(self) -> dict[str, Any]:
        """Return what is no array, as JSON's types."""
        return {name: getattr(self, name) for name in ("sample", "passes", "rows", "dataset")}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the arrays: ``rest`` ``[n]`` and ``buffer`` ``[n, T + 1]``, int32."""
        buffer = np.stack(self.buffer) if self.buffer else np.empty((0, 0), np.int32)
        return {"rest": torch.from_numpy(self.rest.copy()), "buffer": torch.from_numpy(buffer)}

    @classmethod
    def of(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "StreamState":
        """Return the state that :meth:`to_json` and :meth:`to_tensors` were taken from.

        Raises:
            KeyError: a part is missing.
        """
        parts = {name: description[name] for name in ("sample", "passes", "rows", "dataset")}
        return cls(**parts, rest=tensors["rest"].numpy(), buffer=tuple(tensors["buffer"].numpy()))


class StreamSamples:
    """Windows of ``ctx_len`` tokens of a stream: its documents one after another, each followed by its end token.

    The token that one window predicts last is the first that the next one reads, as in a prepared corpus. With a
    shuffle buffer of b windows, sample n is one of b, by a random number of seed and n; the next window of the stream
    takes its place. At its end the dataset is read again. Samples are read in rising order only.

    Args:
        dataset: where the texts come from.
        tokenizer: turns them into tokens.
        config: the settings of the run; ``data.streaming`` is set.

    Raises:
        DataError: the tokenizer has ids that the model has not.
    """

    def __init__(self, dataset: TextDataset, tokenizer: Tokenizer, config: TrainConfig) -> None:
        assert config.data.streaming is not None
        if tokenizer.vocab_size > config.model.vocab_size:
            raise DataError(
                f"the tokenizer '{tokenizer.identity.name}' (data.tokenizer) has {tokenizer.vocab_size} ids but the "
                f"model {config.model.vocab_size} (model.vocab_size); set that to {tokenizer.vocab_size} or more"
            )
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._ctx_len = config.model.ctx_len
        self._step_samples = config.trainer.global_batch_size
        self._seed = config.trainer.seed
        self._buffer_size = config.data.streaming.shuffle_buffer
        self._states: dict[int, StreamState] = {}
        self.begin(0)

    def begin(self, first: int, state: StreamState | None = None) -> None:
        """Go to a place in the stream.

        Args:
            first: number of a sample that is a step's first, not below ``state.sample``; what comes before is passed
                over.
            state: where to start from; ``None``: at the beginning.

        Raises:
            DataError: the dataset cannot be read there; later, in :meth:`read`.
        """
        state = state or StreamState(0, 0, 0, None, np.empty(0, np.int32), ())
        self._first = first
        self._sample, self._passes, self._n_rows = state.sample, state.passes, state.rows
        self._rest, self._buffer = state.rest, list(state.buffer)
        self._rows: Iterator[Row] = self._dataset.rows(state.rows, state.dataset)
        self._has_text = bool(state.rows)  # since the last beginning of the dataset
        self._states = {state.sample: state}

    @property
    def identity(self) -> dict[str, object]:
        """The settings of the stream."""
        return {"streaming": self._dataset.spec.model_dump(mode="json")}

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of a sample, both ``[T]`` int64.

        Raises:
            DataError: the dataset cannot be read on, or has no text.
        """
        assert sample >= self._sample, "a stream does not go back"
        while self._sample < sample:  # those of other processes
            self._next_sample()
        window = torch.from_numpy(self._next_sample().astype(np.int64))
        return window[:-1], window[1:]

    def n_targets(self, first: int, count: int) -> int:
        """Return the targets of ``count`` samples: every token has one."""
        return count * self._ctx_len

    def drawn(self, n_samples: int) -> tuple[Drawn, ...]:
        """Return nothing: there is one stream."""
        return ()

    def state_at(self, sample: int) -> StreamState:
        """Return where the stream stands before a sample, the first of the step that follows the last one done."""
        while self._sample < sample:  # the rest of the step, which other processes read
            self._next_sample()
        return self._states[sample]

    def _next_sample(self) -> TokenArray:
        """Return the next sample, ``[T + 1]``, and keep the state before the next step."""
        size = self._buffer_size
        while len(self._buffer) < size:
            self._buffer.append(self._next_window())
        window = self._next_window()
        if size:
            place = random_number(self._seed, self._sample) % size
            window, self._buffer[place] = self._buffer[place], window
        self._sample += 1
        if self._sample >= self._first and (self._sample - self._first) % self._step_samples == 0:
            self._states[self._sample] = self._state()
            for old in list(self._states)[:-_KEPT_STATES]:
                del self._states[old]
        return window

    def _state(self) -> StreamState:
        dataset = self._dataset.state()
        return StreamState(self._sample, self._passes, self._n_rows, dataset, self._rest, tuple(self._buffer))

    def _next_window(self) -> TokenArray:
        documents = [self._rest]
        n_tokens = len(self._rest)
        while n_tokens <= self._ctx_len:
            documents.append(self._next_document())
            n_tokens += len(documents[-1])
        tokens = np.concatenate(documents) if len(documents) > 1 else self._rest
        self._rest = tokens[self._ctx_len :]
        return tokens[: self._ctx_len + 1].copy()  # a view would keep all tokens of a long document

    def _next_document(self) -> TokenArray:
        """Return the tokens of the next text and its end token, int32."""
        while True:
            row = next(self._rows, None)
            if row is None:
                self._begin_again()
                continue
            self._n_rows += 1
            text = self._dataset.text_of(row)
            if text:
                self._has_text = True
                (tokens,) = self._tokenizer.encode_arrays([text])
                return np.append(tokens.astype(np.int32), np.int32(self._tokenizer.end_of_document))

    def _begin_again(self) -> None:
        name = show(self._dataset.spec)
        if not self._has_text:
            raise DataError(f"the dataset {name} has no text in its {self._n_rows:,} rows")
        self._passes += 1
        logger.info(
            "the dataset %s ended after %s rows; it is read again (pass %d)",
            name,
            f"{self._n_rows:,}",
            self._passes + 1,
        )
        self._rows, self._n_rows, self._has_text = self._dataset.rows(), 0, False
