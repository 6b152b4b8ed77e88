"""What a run reads: to learn from, and held out."""

import random
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.reading import ReadDataset
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.errors import DataError

SampleT = TypeVar("SampleT", TokenizedConversation, PreferencePair)


class Split(NamedTuple, Generic[SampleT]):
    """What a run reads."""

    train: list[ReadDataset[SampleT]]
    """By dataset, in the order of the settings."""
    valid: dict[str, list[SampleT]]
    """What is held out, by the name of its dataset; empty where nothing is."""


def read_split(
    read: Callable[[InstructDataConfig], list[ReadDataset[SampleT]]], config: InstructDataConfig, seed: int
) -> Split[SampleT]:
    """Read what a run learns from and what is held out.

    Args:
        read: reads the datasets of settings.
        config: which, and how.
        seed: chooses what ``valid_fraction`` holds out.

    Raises:
        DataError: as ``read``; or a dataset is too small to be divided.
    """
    train = read(config)
    if config.valid is not None:
        held_out = read(config.model_copy(update={"datasets": config.valid}))
        return Split(train, {one.dataset.name: one.samples for one in held_out})
    if config.valid_fraction is None:
        return Split(train, {})
    divided = [_divide(one, config.valid_fraction, seed) for one in train]
    return Split([kept for kept, _ in divided], {kept.dataset.name: held for kept, held in divided})


def head_of(held_out: dict[str, list[SampleT]], n_tokens: int) -> dict[str, list[SampleT]]:
    """Take the first samples of each dataset, as many positions as its share of ``n_tokens``; at least one."""
    sizes = {name: sum(sample.n_inputs for sample in held) for name, held in held_out.items()}
    return {
        name: _first(held, n_tokens * sizes[name] / sum(sizes.values())) for name, held in held_out.items()
    }


def _first(samples: Sequence[SampleT], n_tokens: float) -> list[SampleT]:
    chosen = []
    for sample in samples:
        if n_tokens <= 0:
            break
        chosen.append(sample)
        n_tokens -= sample.n_inputs
    return chosen


def _divide(
    read: ReadDataset[SampleT], fraction: float, seed: int
) -> tuple[ReadDataset[SampleT], list[SampleT]]:
    count = len(read.samples)
    n_held_out = max(1, round(fraction * count))
    if n_held_out >= count:
        raise DataError(
            f"data.valid_fraction ({fraction:g}) leaves nothing to learn from in {read.dataset.name}, which has "
            f"{count} conversations; hold out less, or name a file in data.valid"
        )
    chosen = set(random.Random(f"held out {seed}").sample(range(count), n_held_out))
    kept = [one for number, one in enumerate(read.samples) if number not in chosen]
    held_out = [read.samples[number] for number in sorted(chosen)]
    return read._replace(samples=kept), held_out
