"""Loss by position in the document: what a model makes of a longer and longer context.

Positions count from 1 and are put together in buckets that end at powers of two: 1, 2, 3-4, 5-8, 9-16 and so on. A
bucket of late positions holds only long documents, which are another kind of text. So a curve is made of those
documents alone that are long enough to fill all of its buckets.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.errors import ConfigError

N_BUCKETS = 48
"""Enough for documents of 2**47 tokens."""

SHARE_OF_DOCUMENTS = 0.1
"""Unless told otherwise a curve is as long as one document in ten."""


class Bucket(NamedTuple):
    """Neighbouring positions."""

    first: int
    last: int
    tokens: int
    """Scored tokens at these positions."""
    loss: float | None
    """Nats per token; ``None`` where none is scored, as the first of a document without a prefix."""

    @property
    def label(self) -> str:
        """The positions: "1", "3-4"."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Curve(NamedTuple):
    """Loss by position over the same documents at every position."""

    min_length: int
    """Documents have at least this many tokens; the curve ends there."""
    documents: int
    buckets: list[Bucket]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return self._asdict() | {"buckets": [bucket._asdict() for bucket in self.buckets]}


class PositionSums:
    """Nats by bucket, apart for documents of 1, 2-3, 4-7, 8-15, ... tokens; only of buckets that they fill."""

    def __init__(self) -> None:
        self.documents: npt.NDArray[np.int64] = np.zeros(N_BUCKETS, np.int64)
        self.nats: npt.NDArray[np.float64] = np.zeros((N_BUCKETS, N_BUCKETS))
        self.tokens: npt.NDArray[np.int64] = np.zeros((N_BUCKETS, N_BUCKETS), np.int64)

    def add(self, losses: npt.NDArray[np.floating], n_unscored: int) -> None:
        """Add a document.

        Args:
            losses: of its tokens in nats, ``[n]``, n at least 1.
            n_unscored: so many at its start are not scored, 0 or 1.
        """
        length_class = len(losses).bit_length() - 1
        n_buckets = length_class + 1
        filled = losses[: 1 << length_class]
        starts = [0, *(1 << n for n in range(length_class))]
        self.documents[length_class] += 1
        self.nats[length_class, :n_buckets] += np.add.reduceat(filled, starts, dtype=np.float64)
        self.tokens[length_class, :n_buckets] += np.diff([*starts, len(filled)])
        self.tokens[length_class, 0] -= n_unscored

    def merge(self, other: "PositionSums") -> None:
        """Add the sums of other documents."""
        self.documents += other.documents
        self.nats += other.nats
        self.tokens += other.tokens

    def curves(self) -> list[Curve]:
        """Return the curve of each length that a document has, from the shortest."""
        lengths = np.flatnonzero(self.documents)
        return [self.curve(1 << n) for n in range(lengths[-1] + 1)] if len(lengths) else []

    def curve(self, min_length: int) -> Curve:
        """Return the curve of documents with at least so many tokens, a power of two."""
        length_class = min_length.bit_length() - 1
        nats = self.nats[length_class:].sum(axis=0)
        tokens = self.tokens[length_class:].sum(axis=0)
        buckets = [
            Bucket(
                first=(1 << n) // 2 + 1,
                last=1 << n,
                tokens=int(tokens[n]),
                loss=float(nats[n] / tokens[n]) if tokens[n] else None,
            )
            for n in range(length_class + 1)
        ]
        return Curve(min_length, int(self.documents[length_class:].sum()), buckets)

    def usual_length(self) -> int:
        """Return the largest power of two that at least ``SHARE_OF_DOCUMENTS`` of the documents reach."""
        reaching = self.documents[::-1].cumsum()[::-1]
        enough = np.flatnonzero((reaching > 0) & (reaching >= SHARE_OF_DOCUMENTS * reaching[0]))
        return 1 << int(enough[-1]) if len(enough) else 1


def require_power_of_two(min_length: int) -> None:
    """Refuse a length at which no bucket ends.

    Raises:
        ConfigError: with the next ones that are right.
    """
    if min_length < 1 or min_length & (min_length - 1):
        below = 1 << max(min_length.bit_length() - 1, 0)
        raise ConfigError(
            f"--min-length is {min_length}; it must be a power of two, where a bucket of the curve ends: "
            f"{below} or {2 * below}"
        )
    if min_length >= 1 << N_BUCKETS:
        raise ConfigError(f"--min-length is {min_length}; it must be at most {1 << (N_BUCKETS - 1)}")
