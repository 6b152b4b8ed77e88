"""A small set of tasks made by code: no file is needed, and an answer can be checked."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from rwkv_train.data.sources.base import Record
from rwkv_train.errors import DataError

SPLITS = {"train": 1024, "valid": 128}
"""Records of each split."""

_WORDS = (
    "apple", "bread", "cloud", "dance", "earth", "flame", "grape", "house", "island", "juice", "knife", "lemon",
    "mouse", "night", "ocean", "paper", "queen", "river", "stone", "train", "uncle", "voice", "water", "zebra",
)  # fmt: skip


class _Task(NamedTuple):
    question: str
    answer: str
    wrong_answer: str


def builtin_records(split: str) -> Iterator[Record]:
    """Yield conversations of one or two turns, always the same ones; no question of "valid" is in "train".

    Raises:
        DataError: there is no such split.
    """
    generator = _generator("instruct", split)
    for number in range(SPLITS[split]):
        messages = [message for _ in range(1 + number % 2) for message in _turn(_task(generator, split))]
        yield Record(f"builtin/{split}, row {number}", {"messages": [*_system(number), *messages]})


def builtin_pairs(split: str) -> Iterator[Record]:
    """Yield records of the format "preference": the right answer is chosen, and a wrong one rejected.

    Always the same ones; in every second a turn with a right answer stands before the question. No question of "valid"
    is in "train".

    Raises:
        DataError: there is no such split.
    """
    generator = _generator("preference", split)
    for number in range(SPLITS[split]):
        before = [message for _ in range(number % 2) for message in _turn(_task(generator, split))]
        task = _task(generator, split)
        yield Record(
            f"builtin/{split}, row {number}",
            {
                "prompt": [*_system(number), *before, {"role": "user", "content": task.question}],
                "chosen": task.answer,
                "rejected": task.wrong_answer,
            },
        )


def _generator(kind: str, split: str) -> random.Random:
    if split not in SPLITS:
        raise DataError(f"the built-in dataset has no split {split!r}; it has {', '.join(SPLITS)}")
    return random.Random(f"{kind} {split}")


def _system(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Answer with one line."}] if number % 4 == 3 else []


def _turn(task: _Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.question}, {"role": "assistant", "content": task.answer}]


def _task(generator: random.Random, split: str) -> _Task:
    """Return a task; its pair of words decides which split it is for."""
    while True:
        first, second = generator.sample(range(len(_WORDS)), 2)
        if ((first + second) % 8 == 0) == (split == "valid"):
            break
    one, other = _WORDS[first], _WORDS[second]
    return generator.choice(
        [
            _Task(f"Swap the words: {one} {other}", f"{other} {one}", f"{one} {other}"),
            _Task(f"Write in capitals: {one} {other}", f"{one} {other}".upper(), f"{one} {other}"),
            _Task(f"Which comes first in the alphabet, {one} or {other}?", min(one, other), max(one, other)),
            _Task(
                f"Spell these words: {one}, {other}",
                f"{'-'.join(one)}\n{'-'.join(other)}",
                f"{one}\n{other}",
            ),
        ]
    )
