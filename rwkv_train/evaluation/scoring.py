"""Losses of many token sequences, read side by side: what every evaluation here is made of.

Each sequence starts from the model's initial state and carries it to its end, however long it is, so a loss does not
depend on the length of the chunks in which the sequence is read. A batch has a row ("lane") for each of several
sequences; a lane whose sequence ends takes the next one with the next call of the model.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.errors import CheckpointError, ConfigError, DataError
from rwkv_train.models.lm import NO_TARGET, LanguageModel
from rwkv_train.models.state import ModelState, join_rows, take_rows
from rwkv_train.tokenizers.base import TokenArray

BATCH_SIZE = 8
CHUNK_LEN = 256

POOL_TOKENS = 1 << 22
POOL_SEQUENCES = 4096
"""Sequences are sorted by length within pools that end at either limit, so that lanes hold similar ones."""

CALL_TOKENS = 256
"""What one call of a model costs beside its tokens, in tokens: the starts of some hundred kernels."""


class Sequence(NamedTuple):
    """Tokens that are read from the initial state, and what is to be predicted after each of them."""

    inputs: TokenArray
    """Token ids, ``[n]``."""
    targets: TokenArray
    """The token that follows each input, ``[n]``, of a signed type; -100 is not scored."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a model made of a sequence."""

    index: int
    """Position of the sequence in the input order."""
    losses: npt.NDArray[np.floating]
    """Negative log-likelihood of each target in nats, ``[n]``, as precise as the model; 0 where not scored."""
    greedy: npt.NDArray[np.bool_] | None
    """Whether each target is the likeliest token, ``[n]``, false where not scored; ``None`` unless asked for."""


def score_sequences(
    model: LanguageModel,
    sequences: Iterable[Sequence],
    *,
    batch_size: int = BATCH_SIZE,
    chunk_len: int = CHUNK_LEN,
    with_greedy: bool = False,
    on_call: Callable[[int, int], None] | None = None,
) -> Iterator[Score]:
    """Score sequences, in any order; neither size changes a loss beyond rounding.

    Memory does not grow with the number of sequences: at most ``POOL_SEQUENCES`` wait, or as many as have
    ``POOL_TOKENS`` tokens.

    Args:
        model: the model, on any device.
        sequences: read once, in order; those without tokens are scored too.
        batch_size: sequences that are read side by side.
        chunk_len: tokens of each that are read at once; more is faster and takes more memory. Where there are fewer
            sequences than lanes, as at the end with the longest, each reads as much longer chunks.
        with_greedy: also tell whether each target is the likeliest token.
        on_call: called after each call of the model with the tokens of the sequences that it read, and the tokens
            that it read in all, padding included.

    Raises:
        ConfigError: ``batch_size`` or ``chunk_len`` is below 1.
        DataError: a token is outside the model's vocabulary.
        CheckpointError: a loss is not finite.
    """
    require_sizes(batch_size=batch_size, chunk_len=chunk_len)
    waiting = _similar_lengths_together(require_vocab(sequences, model.config.vocab_size))
    lanes: list[_Lane] = []
    state = model.zero_state(0)
    with torch.no_grad():
        start = model.initial_state(1)
    while True:
        n_before = len(lanes)
        while len(lanes) < batch_size and (entry := next(waiting, None)) is not None:
            index, sequence = entry
            if len(sequence.inputs):
                lanes.append(_Lane(index, sequence))
            else:
                yield Score(index, np.zeros(0, np.float32), np.zeros(0, np.bool_) if with_greedy else None)
        state = join_rows([state, take_rows(start, [0] * (len(lanes) - n_before))])
        if not lanes:
            return

        n_tokens = best_length([lane.remaining for lane in lanes], batch_size * chunk_len // len(lanes))
        n_read = sum(min(lane.remaining, n_tokens) for lane in lanes)
        state = _read_chunk(model, lanes, state, n_tokens, with_greedy)
        if on_call is not None:
            on_call(n_read, n_tokens * len(lanes))
        yield from (lane.score(with_greedy) for lane in lanes if not lane.remaining)
        going_on = [row for row, lane in enumerate(lanes) if lane.remaining]
        if len(going_on) < len(lanes):
            state = take_rows(state, going_on)
            lanes = [lanes[row] for row in going_on]


def best_length(remaining: list[int], chunk_len: int) -> int:
    """Choose how many tokens the lanes read in one call: those that cost least for each token that is of use.

    A longer chunk spreads the cost of a call over more tokens, but lanes whose sequences end within it read padding.

    Args:
        remaining: tokens that each lane has left, all at least 1.
        chunk_len: the most that may be chosen.
    """
    n_lanes = len(remaining)
    best, least = chunk_len, float("inf")
    n_finished_tokens = 0
    for n_finished, n_tokens in enumerate(sorted(min(left, chunk_len) for left in remaining)):
        n_useful = n_finished_tokens + (n_lanes - n_finished) * n_tokens
        cost = (CALL_TOKENS + n_lanes * n_tokens) / n_useful
        if cost <= least:
            best, least = n_tokens, cost
        n_finished_tokens += n_tokens
    return best


@torch.no_grad()  # not inference_mode: FSDP keeps what it gathers here for the training that goes on
def losses_of(
    model: LanguageModel, inputs: Tensor, targets: Tensor, state: ModelState | None, with_greedy: bool
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_] | None, ModelState]:
    """Call a model once: losses ``[B, T]`` in nats, whether each target is the likeliest, and the new state.

    Args:
        model: the model.
        inputs: token ids, ``[B, T]`` int64 on the CPU.
        targets: likewise; -100 is not scored.
        state: before the first input; ``None`` at the start of a text.
        with_greedy: whether to tell which targets are the likeliest; takes the logits instead of the losses alone.

    Raises:
        CheckpointError: a loss is not finite.
    """
    device = next(model.parameters()).device
    on_device = targets.to(device)
    if with_greedy:
        output = model(inputs.to(device), state)
        assert output.logits is not None
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), on_device.flatten(), ignore_index=NO_TARGET, reduction="none"
        ).view_as(targets)
        greedy = (logits.argmax(dim=2) == on_device).cpu().numpy()
    else:
        output = model(inputs.to(device), state, on_device)
        assert output.losses is not None
        losses, greedy = output.losses, None
    if not bool(torch.isfinite(losses).all()):
        value = float(losses[~torch.isfinite(losses)][0])
        raise CheckpointError(
            f"the loss of a token is {value}, not finite: the model's weights are damaged, or its numbers are too "
            "large for the dtype (try float32)"
        )
    return losses.cpu().numpy(), greedy, output.state


def require_sizes(**sizes: int) -> None:
    """Refuse a size below 1.

    Raises:
        ConfigError: with the value and its name, as the options of the command line have it.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {size}; it must be at least 1")


def require_vocab(sequences: Iterable[Sequence], vocab_size: int) -> Iterator[Sequence]:
    """Pass on sequences whose tokens a model has.

    Raises:
        DataError: a token is outside of the vocabulary.
    """
    for sequence in sequences:
        if len(sequence.inputs):
            highest = max(int(sequence.inputs.max()), int(sequence.targets.max()))
            lowest = int(sequence.inputs.min())
            if highest >= vocab_size or lowest < 0:
                raise DataError(
                    f"the token {highest if highest >= vocab_size else lowest} is outside of the model's vocabulary "
                    f"of {vocab_size}: the tokenizer is not the model's"
                )
        yield sequence


class _Lane:
    """One row of the batch: a sequence and how far it is read."""

    def __init__(self, index: int, sequence: Sequence) -> None:
        self.index = index
        self.sequence = sequence
        self.position = 0
        self._losses: list[npt.NDArray[np.floating]] = []
        self._greedy: list[npt.NDArray[np.bool_]] = []

    @property
    def remaining(self) -> int:
        return len(self.sequence.inputs) - self.position

    def add(self, losses: npt.NDArray[np.floating], greedy: npt.NDArray[np.bool_] | None) -> None:
        self._losses.append(losses.copy())  # a view would keep the whole batch
        if greedy is not None:
            self._greedy.append(greedy.copy())
        self.position += len(losses)

    def score(self, with_greedy: bool) -> Score:
        return Score(
            self.index,
            np.concatenate(self._losses),
            np.concatenate(self._greedy) if with_greedy else None,
        )


def _read_chunk(
    model: LanguageModel, lanes: list[_Lane], state: ModelState, n_tokens: int, with_greedy: bool
) -> ModelState:
    """Let each lane read its next tokens, at most ``n_tokens``."""
    inputs = torch.zeros(len(lanes), n_tokens, dtype=torch.int64)
    # What follows a shorter sequence is padding: read after all its tokens, never scored.
    targets = torch.full_like(inputs, NO_TARGET)
    for row, lane in enumerate(lanes):
        part = slice(lane.position, lane.position + n_tokens)
        n_read = min(n_tokens, lane.remaining)
        inputs[row, :n_read] = torch.from_numpy(lane.sequence.inputs[part].astype(np.int64))
        targets[row, :n_read] = torch.from_numpy(lane.sequence.targets[part].astype(np.int64))
    losses, greedy, new_state = losses_of(model, inputs, targets, state, with_greedy)
    for row, lane in enumerate(lanes):
        n_read = min(n_tokens, lane.remaining)
        lane.add(losses[row, :n_read], None if greedy is None else greedy[row, :n_read])
    return new_state


def _similar_lengths_together(sequences: Iterable[Sequence]) -> Iterator[tuple[int, Sequence]]:
    """Number the sequences and sort them by length, longest first, within pools of bounded size."""
    pool: list[tuple[int, Sequence]] = []
    n_tokens = 0
    for index, sequence in enumerate(sequences):
        pool.append((index, sequence))
        n_tokens += len(sequence.inputs)
        if n_tokens >= POOL_TOKENS or len(pool) >= POOL_SEQUENCES:
            yield from sorted(pool, key=_length, reverse=True)
            pool, n_tokens = [], 0
    yield from sorted(pool, key=_length, reverse=True)


def _length(entry: tuple[int, Sequence]) -> int:
    return len(entry[1].inputs)
