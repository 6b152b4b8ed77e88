"""Numbers dealt out to several parts in fixed proportions."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm


class Mixture:
    """Deals the numbers 0, 1, 2, ... out to k parts by weight, evenly spread.

    Part 0 has taken ``floor(n w_0 / W)`` of the first n numbers (W: the sum of all weights), so it takes number n
    where that grows; the numbers that it leaves are dealt out to the other parts in the same way. So after any
    number each part has its exact share but for less than k numbers, without chance and without memory.

    Args:
        weights: one positive number a part. They are taken as the decimal fractions that they are written as, so 0.1 is
            a tenth.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(weight)) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]
        self._totals = [sum(self._weights[part:]) for part in range(len(weights))]

    def locate(self, number: int) -> tuple[int, int]:
        """Return the part that takes a number, and how many it took before."""
        for part, (weight, total) in enumerate(zip(self._weights, self._totals, strict=True)):
            before = number * weight // total
            if (number + 1) * weight // total > before:
                return part, before
            number -= before
        raise AssertionError("the last part takes all that is left")

    def drawn(self, n: int) -> tuple[int, ...]:
        """Return how many of the first ``n`` numbers each part takes."""
        counts = []
        for weight, total in zip(self._weights, self._totals, strict=True):
            counts.append(n * weight // total)
            n -= counts[-1]
        return tuple(counts)
