import pytest
import torch

from rwkv_train.checkpoints.zero_partitions import MisfitError, Slice, cut_row, join_parts, join_slices

SHAPES = {"a": (7, 3), "b": (1,), "c": (1, 1, 11), "empty": (0, 4), "d": (2, 2)}
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 40])


def some_parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def padded(row, multiple):
    """The row with NaN after it, so that padding taken for a weight is seen."""
    return torch.cat([row, torch.full((-len(row) % multiple,), torch.nan)])


def shard_row(parameters, world_size, gap=0):
    """ZeRO 1 and 2, number by number: partitions, and which numbers in them are of which parameter."""
    owners, row = [], []
    for name, parameter in parameters.items():
        owners += [name] * parameter.numel() + [None] * gap
        row += [*parameter.flatten().tolist(), *[torch.nan] * gap]
    row = padded(torch.tensor(row), 2 * world_size)
    partitions = list(row.chunk(world_size))
    length = len(partitions[0])
    places = []
    for rank in range(world_size):
        here = owners[rank * length : (rank + 1) * length]
        names = {name for name in here if name is not None}
        places.append({name: Slice(here.index(name), here.count(name)) for name in names})
    return partitions, places


def shard_each(parameters, world_size):
    """ZeRO 3: each parameter in equal parts."""
    cut = [padded(parameter.flatten(), world_size).view(world_size, -1) for parameter in parameters.values()]
    return [torch.cat([parts[rank] for parts in cut]) for rank in range(world_size)]


def assert_same(joined, parameters):
    assert list(joined) == list(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(joined[name], parameter, rtol=0, atol=0)


@WORLD_SIZES
@pytest.mark.parametrize("gap", [0, 3], ids=["end-to-end", "with-gaps"])
def test_pieces_of_a_row_give_the_parameters(world_size, gap):
    partitions, places = shard_row(some_parameters(), world_size, gap)
    assert_same(join_slices(SHAPES, partitions, places), some_parameters())


@WORLD_SIZES
def test_a_row_without_places_is_cut_in_order(world_size):
    partitions, _ = shard_row(some_parameters(), world_size)
    assert_same(cut_row(SHAPES, partitions), some_parameters())


@WORLD_SIZES
def test_equal_parts_give_the_parameters(world_size):
    assert_same(join_parts(SHAPES, shard_each(some_parameters(), world_size)), some_parameters())


def test_a_piece_too_few_or_outside_the_partition_is_refused():
    partitions, places = shard_row(some_parameters(), 3)
    holder = next(rank for rank, here in enumerate(places) if "c" in here)
    without = [{n: s for n, s in here.items() if (n, r) != ("c", holder)} for r, here in enumerate(places)]
    with pytest.raises(MisfitError, match=r"parameter 'c' \[1, 1, 11\] has 11 numbers, the processes \d+$"):
        join_slices(SHAPES, partitions, without)
    outside = [here | {"a": Slice(10_000, 1)} for here in places]
    with pytest.raises(MisfitError, match=r"rank 0 has 14 numbers, .* 'a' cannot lie at 10000 to 10001"):
        join_slices(SHAPES, partitions, outside)


def test_partitions_of_another_length_are_refused():
    with pytest.raises(MisfitError, match=r"the processes have 12 numbers, the parameters 37"):
        cut_row(SHAPES, [torch.zeros(12)])
    parts = shard_each(some_parameters(), 2)
    with pytest.raises(MisfitError, match=r"rank 1 has 19 numbers, .* leave 20 to each of 2 processes"):
        join_parts(SHAPES, [parts[0], parts[1][:-1]])
