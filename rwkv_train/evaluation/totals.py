"""Sums over scored documents, and the rates that are made of them."""

import math
import re
from typing import Any, NamedTuple

BITS_PER_NAT = 1 / math.log(2)


class Totals(NamedTuple):
    """What was scored, summed over documents; totals of two sets add up to those of both."""

    documents: int = 0
    tokens: int = 0
    """Scored tokens; the end-of-document tokens are not scored."""
    bytes: int = 0
    """Length of the documents' text in UTF-8."""
    words: int = 0
    """What whitespace separates, as lm-evaluation-harness counts; 0 where the text is not at hand."""
    nats: float = 0.0
    """Negative log-likelihood of the scored tokens."""

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]  # sums, not concatenation
        return Totals(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.words + other.words,
            self.nats + other.nats,
        )

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def token_ppl(self) -> float:
        """Perplexity of a token; compares only with numbers of the same tokenizer."""
        return _exp(self.loss)

    @property
    def word_ppl(self) -> float:
        """Perplexity of a word, whatever the tokenizer; languages without spaces have few words."""
        return _exp(self.nats / self.words)

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
            "loss": self.loss if self.tokens else None,
            "token_ppl": _finite(self.token_ppl) if self.tokens else None,
            "word_ppl": _finite(self.word_ppl) if self.tokens and self.words else None,
            "byte_ppl": _finite(self.byte_ppl) if self.tokens and self.bytes else None,
            "bits_per_byte": self.bits_per_byte if self.tokens and self.bytes else None,
        }


def count_words(text: str) -> int:
    """Count the words of a text, as lm-evaluation-harness does: the pieces between runs of whitespace.

    Example:
        >>> count_words("two  words")
        2
    """
    return len(re.split(r"\s+", text))


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
    return total_nats / total_bytes * BITS_PER_NAT


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
