"""Sums over scored documents, and the rates that are made of them."""

import math
from typing import Any, NamedTuple


class Totals(NamedTuple):
    """What was scored, summed over documents; totals of two sets add up to those of both."""

    documents: int = 0
    tokens: int = 0
    """Scored tokens: all of the documents' text; the end-of-document tokens are not scored."""
    bytes: int = 0
    """Length of the documents' text in UTF-8."""
    nats: float = 0.0
    """Negative log-likelihood of the scored tokens."""

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]  # sums, not concatenation
        return Totals(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.nats + other.nats,
        )

    @property
    def token_ppl(self) -> float:
        """Perplexity of a token; compares only with numbers of the same tokenizer."""
        return _exp(self.nats / self.tokens)

    @property
    def byte_ppl(self) -> float:
        """Perplexity of a byte: 2 to the power of bits_per_byte."""
        return _exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text, whatever its tokenizer."""
        return bits_per_byte(self.nats, self.bytes)

    def to_json(self) -> dict[str, Any]:
        """Return sums and rates as JSON's types; a rate per nothing, or beyond the largest float, is null."""
        return self._asdict() | {
            "token_ppl": _finite(self.token_ppl) if self.tokens else None,
            "byte_ppl": _finite(self.byte_ppl) if self.bytes else None,
            "bits_per_byte": self.bits_per_byte if self.bytes else None,
        }


class Report(NamedTuple):
    """The result of an evaluation."""

    domains: dict[str, Totals]
    """Totals of each domain, by name in alphabetical order."""

    @property
    def total(self) -> Totals:
        """Totals of all documents: sums, not a mean of the domains' rates."""
        return sum(self.domains.values(), start=Totals())

    def to_json(self) -> dict[str, Any]:
        """Return ``{"total": {...}, "domains": {name: {...}}}``."""
        domains = {name: totals.to_json() for name, totals in self.domains.items()}
        return {"total": self.total.to_json(), "domains": domains}


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Convert a summed loss to bits per byte, which does not depend on the tokenizer.

    Args:
        total_nats: negative log-likelihood, summed (not averaged) over the scored tokens, in nats.
        total_bytes: length of the same text in UTF-8, in bytes.

    Returns:
        Bits per byte; 0 is perfect, 8 is as good as guessing every bit.

    Raises:
        ValueError: ``total_bytes`` is not positive.

    Example:
        >>> bits_per_byte(total_nats=math.log(2), total_bytes=1)
        1.0
    """
    if total_bytes <= 0:
        raise ValueError(f"total_bytes is {total_bytes}; it must be positive")
    return total_nats / (total_bytes * math.log(2))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
