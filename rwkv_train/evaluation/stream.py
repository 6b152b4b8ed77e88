"""Losses of sequences that are one stream: the state goes on from each to the next."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from rwkv_train.evaluation.scoring import CHUNK_LEN, Score, Sequence, losses_of, require_sizes, require_vocab
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import ModelState


def score_stream(
    model: LanguageModel, sequences: Iterable[Sequence], *, chunk_len: int = CHUNK_LEN
) -> Iterator[Score]:
    """Score sequences in their order, one after another without a fresh state; chunks run on across their ends.

    Args:
        model: the model, on any device.
        sequences: read once; none may be without tokens.
        chunk_len: tokens that are read at once; it changes losses only by rounding.

    Raises:
        ConfigError: ``chunk_len`` is below 1.
        DataError: a token is outside the model's vocabulary.
        CheckpointError: a loss is not finite.
    """
    require_sizes(chunk_len=chunk_len)
    state: ModelState | None = None
    unfinished: dict[int, list[npt.NDArray[np.floating]]] = {}
    for parts in _chunks(require_vocab(sequences, model.config.vocab_size), chunk_len):
        inputs = np.concatenate([sequence.inputs for _, sequence, _ in parts])
        targets = np.concatenate([sequence.targets for _, sequence, _ in parts])
        batch = [torch.from_numpy(x.astype(np.int64))[None] for x in (inputs, targets)]
        losses, _, state = losses_of(model, batch[0], batch[1], state, with_greedy=False)
        position = 0
        for index, sequence, is_end in parts:
            n_read = len(sequence.inputs)
            unfinished.setdefault(index, []).append(losses[0, position : position + n_read].copy())
            position += n_read
            if is_end:
                yield Score(index, np.concatenate(unfinished.pop(index)), None)


def _chunks(sequences: Iterable[Sequence], chunk_len: int) -> Iterator[list[tuple[int, Sequence, bool]]]:
    """Yield parts of sequences that fill a chunk: number of the sequence, part, whether the sequence ends with it."""
    parts: list[tuple[int, Sequence, bool]] = []
    room = chunk_len
    for index, sequence in enumerate(sequences):
        start = 0
        while start < len(sequence.inputs):
            end = min(start + room, len(sequence.inputs))
            part = Sequence(sequence.inputs[start:end], sequence.targets[start:end])
            parts.append((index, part, end == len(sequence.inputs)))
            room -= end - start
            start = end
            if not room:
                yield parts
                parts, room = [], chunk_len
    if parts:
        yield parts
