"""Parameters from the flat partitions in which ZeRO's processes hold them; pure functions of tensors.

An optimizer group is one row of numbers. ZeRO 1 and 2 lay its parameters end to end and cut the row into one
partition a process, so that a cut may fall inside a parameter and the padding is at the end of the row. ZeRO 3
cuts each parameter by itself into as many equal parts as there are processes, the last one padded with whatever
lay in memory; a process's partition is its part of each parameter, end to end.

Source: the files that DeepSpeed 0.19 writes.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

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
) -> dict[str, Tensor]:
    """Put the parameters of a ZeRO 1 or 2 group together from their pieces.

    Args:
        shapes: of the group's parameters.
        partitions: one a process, by rank, each ``[n]``.
        slices: for each process, by rank, the pieces of parameters in its partition.

    Raises:
        MisfitError: pieces do not add up to a parameter, or lie outside a partition.
    """
    joined = {}
    for name, shape in shapes.items():
        pieces = []
        for rank, (partition, here) in enumerate(zip(partitions, slices, strict=True)):
            if name not in here:
                continue
            start, numel = here[name]
            if start < 0 or numel < 0 or start + numel > partition.numel():
                raise MisfitError(
                    f"rank {rank} has {partition.numel()} numbers, in which parameter '{name}' cannot lie at "
                    f"{start} to {start + numel}"
                )
            pieces.append(partition[start : start + numel])
        joined[name] = _shaped(name, shape, pieces)
    return joined


def cut_row(shapes: Shapes, partitions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put the parameters of a ZeRO 1 or 2 group together where no places of pieces are known.

    Args:
        shapes: as in :func:`join_slices`.
        partitions: as in :func:`join_slices`.

    Raises:
        MisfitError: there are fewer numbers than the parameters have.
    """
    row = torch.cat(list(partitions))
    wanted = sum(prod(shape) for shape in shapes.values())
    if row.numel() < wanted:
        raise MisfitError(f"the processes have {row.numel()} numbers, the parameters {wanted}")
    pieces = torch.split(row[:wanted], [prod(shape) for shape in shapes.values()])
    return {
        name: piece.reshape(tuple(shape)) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def join_parts(shapes: Shapes, partitions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put the parameters of a ZeRO 3 group together from the processes' equal parts.

    Args:
        shapes: of the group's parameters.
        partitions: one a process, by rank, each ``[n]``: a part of each parameter.

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
    return {
        name: _shaped(name, shape, parts, has_padding=True)
        for (name, shape), parts in zip(shapes.items(), zip(*parts_by_rank, strict=True), strict=True)
    }


def _shaped(
    name: str, shape: Sequence[int], pieces: Sequence[Tensor], *, has_padding: bool = False
) -> Tensor:
    found, wanted = sum(piece.numel() for piece in pieces), prod(shape)
    if found < wanted or (found > wanted and not has_padding):
        raise MisfitError(f"parameter '{name}' {list(shape)} has {wanted} numbers, the processes {found}")
    row = torch.cat(list(pieces)) if pieces else torch.empty(0)
    return row[:wanted].reshape(tuple(shape))
