"""How the rows of a batch are cut into sequences."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class SequenceContext(NamedTuple):
    """One immutable value a batch, handed to every mix and every operator.

    A tuple, not a dataclass, because PyTorch 2.11 cannot compile a function that makes one of those.

    It says where sequences start. In a plain batch (:data:`PLAIN`, all fields ``None``) each of the B rows is one
    sequence, which goes on from the state that is passed with it. In a packed batch (:func:`packed_context`) the
    one row (B = 1) holds S sequences one after another, and all that belongs to a sequence has S rows: states
    ``[S, ...]``, last inputs ``[S, C]``. A sequence may be empty: its final state is the one it came with, so that
    S can be padded to a fixed number.

    Only tensors of S numbers stand here, and no function that a model calls reads one of them into Python: a
    compiled model sees the same graph whatever the lengths, and a GPU is not waited for.
    """

    cu_seqlens: Tensor | None = None
    """Where sequences start: s has the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1``; ``[S + 1]`` int64."""
    first: Tensor | None = None
    """Position of each sequence's first token, ``[S]`` int64; T for an empty sequence."""
    last: Tensor | None = None
    """Position of each sequence's last token, ``[S]`` int64; any position for an empty sequence."""
    is_empty: Tensor | None = None
    """Whether a sequence has no token, ``[S, 1]`` bool."""


PLAIN = SequenceContext()
"""Every row of the batch is one sequence."""


def packed_context(cu_seqlens: Tensor) -> SequenceContext:
    """Return the context of one row in which sequences stand one after another; made once a batch.

    Args:
        cu_seqlens: where sequences start, and the number of tokens T at the end, ``[S + 1]`` int64: from 0 to T and
            never falling. On the device of the batch. Its values are checked here only on the CPU; on a GPU that
            would wait for the device.

    Raises:
        ValueError: it has another shape or dtype, does not start with 0, or falls.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int64:
        shape = tuple(cu_seqlens.shape)
        raise ValueError(
            f"cu_seqlens must be torch.int64 of shape [S + 1], got {cu_seqlens.dtype} of shape {shape}"
        )
    if cu_seqlens.device.type == "cpu":
        sequence_slices(cu_seqlens, int(cu_seqlens[-1]))
    start, end = cu_seqlens[:-1], cu_seqlens[1:]
    is_empty = start == end
    return SequenceContext(
        cu_seqlens,
        first=torch.where(is_empty, cu_seqlens[-1], start),
        last=(end - 1).clamp(min=0),
        is_empty=is_empty.unsqueeze(1),
    )


def count_sequences(context: SequenceContext, batch_size: int) -> int:
    """Return how many sequences a batch of ``batch_size`` rows holds: the rows of a state.

    Raises:
        ValueError: the batch is packed and has not one row.
    """
    if context.cu_seqlens is None:
        return batch_size
    if batch_size != 1:
        raise ValueError(f"packed sequences stand in one row: B must be 1, got {batch_size}")
    return context.cu_seqlens.shape[0] - 1


def sequence_slices(cu_seqlens: Tensor, n_tokens: int) -> list[slice]:
    """Return the tokens of each sequence. On a GPU this waits for the device.

    Raises:
        ValueError: ``cu_seqlens`` does not go from 0 to ``n_tokens``, or falls.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != n_tokens:
        raise ValueError(f"cu_seqlens must go from 0 to {n_tokens}, got {bounds[0]} to {bounds[-1]}")
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not fall, got {start} and then {end} at sequence {s}")
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]
