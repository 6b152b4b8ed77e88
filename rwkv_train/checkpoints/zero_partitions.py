"""Parameters from the flat partitions in which ZeRO's processes hold them; pure functions of tensors.

An optimizer group is one row of numbers. ZeRO 1 and 2 lay its parameters end to end and cut the row into one
partition a process, so that a cut may fall inside a parameter and the padding is at the end of the row. ZeRO 3
cuts each parameter by itself into as many equal parts as there are processes, the last one padded with whatever
lay in memory; a process's partition is its part of each parameter, end to end.

Source: the files that DeepSpeed 0.19 writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.tensor_source import TensorSource

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> its shape, in the order in which the parameters lie in the row."""


class Slice(NamedTuple):
    """Where a piece of a parameter lies in a process's partition."""

    start: int
    """Index of its first number."""
    numel: int
    """How many numbers it has."""


class MisfitError(Exception):
    """Why partitions and shapes do not belong together; the caller says which files they are from."""


def join_slices(
    shapes: Shapes, partitions: Sequence[Tensor], slices: Sequence[Mapping[str, Slice]]
) -> TensorSource:
    """Put the parameters of a ZeRO 1 or 2 group together from their pieces.

    Args:
        shapes: of the group's parameters.
        partitions: one a process, by rank, each ``[n]``.
        slices: for each process, by rank, the pieces of parameters in its partition.

    Returns:
        The parameters; each is put together when it is asked for.

    Raises:
        MisfitError: pieces do not add up to a parameter, or lie outside a partition.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for rank, (partition, here) in enumerate(zip(partitions, slices, strict=True)):
        for name, (start, numel) in here.items():
            if name not in pieces:
                continue
            if start < 0 or numel < 0 or start + numel > partition.numel():
                raise MisfitError(
                    f"rank {rank} has {partition.numel()} numbers, in which parameter '{name}' cannot lie at "
                    f"{start} to {start + numel}"
                )
            pieces[name].append(partition[start : start + numel])
    return _joined(shapes, pieces)


def cut_row(shapes: Shapes, partitions: Sequence[Tensor]) -> TensorSource:
    """Put the parameters of a ZeRO 1 or 2 group together where no places of pieces are known.

    Args:
        shapes: as in :func:`join_slices`.
        partitions: as in :func:`join_slices`.

    Returns:
        As :func:`join_slices`.

    Raises:
        MisfitError: there are fewer numbers than the parameters have.
    """
    found = sum(partition.numel() for partition in partitions)
    wanted = sum(prod(shape) for shape in shapes.values())
    if found < wanted:
        raise MisfitError(f"the processes have {found} numbers, the parameters {wanted}")
    rows = dict(zip(shapes, _spans(prod(shape) for shape in shapes.values()), strict=True))
    slices = []
    for first, last in _spans(partition.numel() for partition in partitions):
        overlaps = ((name, max(first, start), min(last, end)) for name, (start, end) in rows.items())
        slices.append(
            {name: Slice(start - first, end - start) for name, start, end in overlaps if start < end}
        )
    return join_slices(shapes, partitions, slices)


def join_parts(shapes: Shapes, partitions: Sequence[Tensor]) -> TensorSource:
    """Put the parameters of a ZeRO 3 group together from the processes' equal parts.

    Args:
        shapes: of the group's parameters.
        partitions: one a process, by rank, each ``[n]``: a part of each parameter.

    Returns:
        As :func:`join_slices`.

    Raises:
        MisfitError: the parts have another length than the parameters imply.
    """
    sizes = [-(-prod(shape) // len(partitions)) for shape in shapes.values()]  # divided, rounded up
    for rank, partition in enumerate(partitions):
        if partition.numel() != sum(sizes):
            raise MisfitError(
                f"rank {rank} has {partition.numel()} numbers, the parameters of the group leave {sum(sizes)} "
                f"to each of {len(partitions)} processes"
            )
    parts_by_rank = [torch.split(partition, sizes) for partition in partitions]
    return _joined(shapes, dict(zip(shapes, zip(*parts_by_rank, strict=True), strict=True)), has_padding=True)


def _spans(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Where each of some things that lie end to end starts and ends."""
    return list(pairwise([0, *accumulate(lengths)]))


def _joined(
    shapes: Shapes, pieces: Mapping[str, Sequence[Tensor]], *, has_padding: bool = False
) -> TensorSource:
    for name, shape in shapes.items():
        found, wanted = sum(piece.numel() for piece in pieces[name]), prod(shape)
        if found < wanted or (found > wanted and not has_padding):
            raise MisfitError(f"parameter '{name}' {list(shape)} has {wanted} numbers, the processes {found}")
    dtype = next((piece.dtype for own in pieces.values() for piece in own), torch.float32)

    def join(name: str) -> Tensor:
        shape = tuple(shapes[name])
        row = torch.cat(list(pieces[name])) if pieces[name] else torch.empty(0, dtype=dtype)
        return row[: prod(shape)].reshape(shape)

    headers = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    return TensorSource(headers, join)
