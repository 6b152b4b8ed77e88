"""What an evaluation found, by domain and pooled, with intervals; reports of parts add up to that of the whole."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_train.evaluation.bootstrap import N_REPLICATES, FloatArray, Interval, draws, interval, ratio
from rwkv_train.evaluation.positions import PositionSums
from rwkv_train.evaluation.totals import BITS_PER_NAT, Totals


@dataclass
class Sums:
    """Totals of some documents, and in each replicate of the bootstrap."""

    totals: Totals = field(default_factory=Totals)
    replicates: FloatArray = field(default_factory=lambda: np.zeros((3, N_REPLICATES)))
    """Nats, tokens and bytes, each weighted by the draws."""

    def merge(self, other: "Sums") -> None:
        """Add the sums of other documents."""
        self.totals += other.totals
        self.replicates += other.replicates

    @property
    def bits_per_byte(self) -> FloatArray:
        """Bits per byte in each replicate, ``[N_REPLICATES]``."""
        return ratio(self.replicates[0], self.replicates[2]) * BITS_PER_NAT

    @property
    def loss(self) -> FloatArray:
        """Nats per token in each replicate, ``[N_REPLICATES]``."""
        return ratio(self.replicates[0], self.replicates[1])

    @property
    def bits_per_byte_interval(self) -> Interval | None:
        """95 % interval over documents; ``None`` for one document, unknown bytes or nothing scored."""
        return interval(self.bits_per_byte, self.totals.documents) if self.totals.tokens else None

    @property
    def loss_interval(self) -> Interval | None:
        """95 % interval over documents; ``None`` for one document or nothing scored."""
        return interval(self.loss, self.totals.documents)

    def to_json(self) -> dict[str, Any]:
        """Return totals, rates and intervals as JSON's types."""
        return self.totals.to_json() | {
            "loss_interval": self.loss_interval,
            "bits_per_byte_interval": self.bits_per_byte_interval,
        }


class Report:
    """The result of an evaluation."""

    def __init__(self) -> None:
        self.positions = PositionSums()
        self._domains: dict[str, Sums] = {}

    @property
    def domains(self) -> dict[str, Sums]:
        """Sums of each domain, by name in alphabetical order."""
        return dict(sorted(self._domains.items()))

    @property
    def pooled(self) -> Sums:
        """Sums over all documents, so that its rates are not a mean of the domains' rates."""
        pooled = Sums()
        for sums in self._domains.values():
            pooled.merge(sums)
        return pooled

    @property
    def total(self) -> Totals:
        """Totals of all documents."""
        return self.pooled.totals

    def add(
        self,
        domain: str,
        totals: Totals,
        losses: npt.NDArray[np.floating],
        *,
        number: int,
        n_unscored: int = 0,
    ) -> None:
        """Add a document.

        Args:
            domain: of the document.
            totals: of the document.
            losses: of its tokens in nats, ``[n]``; one without tokens has no place in the curves.
            number: its position in the data, by which it is drawn in the bootstrap.
            n_unscored: so many of its tokens, at its start, are not scored.
        """
        sums = self._domains.setdefault(domain, Sums())
        sums.totals += totals
        sums.replicates += np.outer([totals.nats, totals.tokens, totals.bytes], draws(number))
        if len(losses):
            self.positions.add(losses, n_unscored)

    def merge(self, other: "Report") -> None:
        """Add the report of other documents."""
        for domain, sums in other.domains.items():
            self._domains.setdefault(domain, Sums()).merge(sums)
        self.positions.merge(other.positions)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"total": {...}, "domains": {name: {...}}, "positions": [...]}``."""
        return {
            "total": self.pooled.to_json(),
            "domains": {name: sums.to_json() for name, sums in self.domains.items()},
            "positions": [curve.to_json() for curve in self.positions.curves()],
        }
