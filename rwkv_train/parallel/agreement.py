"""One error for all processes, from those that some of them have."""

from collections.abc import Sequence
from typing import Any

from rwkv_train.errors import RwkvTrainError
from rwkv_train.parallel.lost import name_ranks

Parts = tuple[type[Exception], tuple[Any, ...]]
"""Class and arguments: an error as another process can make it again."""

_SHOWN_FAILURES = 3


def as_parts(error: RwkvTrainError | OSError) -> Parts:
    """An error as another process can make it again, whatever its class wants in ``__init__``."""
    if isinstance(error, OSError):
        return type(error), (error.errno, error.strerror, error.filename)
    return type(error), (str(error),)


def joined(failures: Sequence[Parts | None]) -> Exception | None:
    """One error for all processes, from those of each; with ranks unless all have the same."""
    ranks: dict[Parts, list[int]] = {}
    for rank, failure in enumerate(failures):
        if failure is not None:
            ranks.setdefault(failure, []).append(rank)
    if not ranks:
        return None
    (kind, arguments), those = next(iter(ranks.items()))
    is_everywhere = len(those) == len(failures)
    if issubclass(kind, OSError):
        number, text, place = arguments
        return OSError(number, text, place if is_everywhere else f"{name_ranks(those)}: {place or 'a file'}")
    messages = [f"{name_ranks(those)}: {' '.join(map(str, parts))}" for (_, parts), those in ranks.items()]
    error = kind.__new__(kind)
    error.args = (str(arguments[0]) if is_everywhere else "; ".join(messages[:_SHOWN_FAILURES]),)
    return error
