"""How far a result would move with other documents of the same kind: a bootstrap over documents.

An ordinary bootstrap draws n of the n documents with replacement, many times. How often a document is drawn is then
nearly a Poisson number of mean 1, independent of the others. Drawn as such, and as a hash of the document's number,
it needs no list of documents: sums of replicates are added up as documents come, in any order, by any number of
processes. And every model that is scored on the same documents gets the same draws, so that differences are paired.

Source:
    Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams", section 3 (the Poisson bootstrap).
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

N_REPLICATES = 1000
LEVEL = 0.95
"""Share of the replicates that lie within an interval."""

_MOST_DRAWS = 18  # a Poisson number of mean 1 is larger with a probability of 3e-18
_CUMULATED = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(_MOST_DRAWS)])

FloatArray = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """Where a quantity lies, from the percentiles of its replicates."""

    low: float
    high: float


def draws(number: int) -> FloatArray:
    """Return how often a document is drawn in each replicate, ``[N_REPLICATES]``, the same whoever asks.

    Args:
        number: position of the document in the data, at least 0.
    """
    # The raw bits of a counter-based generator are the same in every version of NumPy; its distributions are not.
    bits = np.random.Philox(key=number).random_raw(N_REPLICATES)
    uniform = (bits >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(_CUMULATED, uniform, side="right").astype(np.float64)


def interval(replicates: FloatArray, n_documents: int) -> Interval | None:
    """Return the percentile interval of a quantity's replicates.

    Args:
        replicates: its value in each replicate, ``[N_REPLICATES]``; those in which no document was drawn, which
            happens where there are few, are not finite and left out.
        n_documents: how many documents it is made of; one tells nothing of how they differ.

    Returns:
        The interval that holds ``LEVEL`` of the replicates, or ``None`` for fewer than two documents.
    """
    drawn = replicates[np.isfinite(replicates)]
    if n_documents < 2 or not len(drawn):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


def ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide, with NaN where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)
