"""A small set of tasks made by code: no file is needed, and an answer can be checked."""

import random
from collections.abc import Iterator

from rwkv_train.data.sources.base import Record
from rwkv_train.errors import DataError

SPLITS = {"train": 1024, "valid": 128}
"""Records of each split."""

_WORDS = (
    "apple", "bread", "cloud", "dance", "earth", "flame", "grape", "house", "island", "juice", "knife", "lemon",
    "mouse", "night", "ocean", "paper", "queen", "river", "stone", "train", "uncle", "voice", "water", "zebra",
)  # fmt: skip


def builtin_records(split: str) -> Iterator[Record]:
    """Yield conversations of one or two turns, always the same ones; no question of "valid" is in "train".

    Raises:
        DataError: there is no such split.
    """
    if split not in SPLITS:
        raise DataError(f"the built-in dataset has no split {split!r}; it has {', '.join(SPLITS)}")
    generator = random.Random(f"instruct {split}")
    for number in range(SPLITS[split]):
        turns = [_task(generator, split) for _ in range(1 + number % 2)]
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        if number % 4 == 3:
            messages.insert(0, {"role": "system", "content": "Answer with one line."})
        yield Record(f"builtin/{split}, row {number}", {"messages": messages})


def _task(generator: random.Random, split: str) -> tuple[str, str]:
    """Return a question and its answer; the pair of words decides which split it is for."""
    while True:
        first, second = generator.sample(range(len(_WORDS)), 2)
        if ((first + second) % 8 == 0) == (split == "valid"):
            break
    one, other = _WORDS[first], _WORDS[second]
    return generator.choice(
        [
            (f"Swap the words: {one} {other}", f"{other} {one}"),
            (f"Write in capitals: {one} {other}", f"{one} {other}".upper()),
            (f"Which comes first in the alphabet, {one} or {other}?", min(one, other)),
            (f"Spell these words: {one}, {other}", f"{'-'.join(one)}\n{'-'.join(other)}"),
        ]
    )
