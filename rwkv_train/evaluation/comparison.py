"""How two models differ on the same documents: paired, so that what makes a document hard for both drops out."""

from typing import Any, NamedTuple

from rwkv_train.evaluation.bootstrap import Interval, interval
from rwkv_train.evaluation.report import Report, Sums


class Difference(NamedTuple):
    """A rate of one model minus that of another; below 0 it is the better one."""

    value: float
    interval: Interval | None
    """95 % interval over documents; one that holds 0 leaves open which model is better."""


class Differences(NamedTuple):
    """Differences in the two rates that have intervals; ``None`` where they do not compare."""

    bits_per_byte: Difference | None
    loss: Difference | None
    """In nats per token; only of models with the same tokenizer."""

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON's types."""
        return {name: part and part._asdict() for name, part in self._asdict().items()}


def differences(first: Report, other: Report, *, same_tokenizer: bool) -> dict[str | None, Differences]:
    """Return how ``other`` differs from ``first`` by domain, and over all under the key ``None``.

    Args:
        first: of the model that is compared with.
        other: of another model on the same documents.
        same_tokenizer: whether both have the same tokens, so that nats per token compare.

    Raises:
        ValueError: the reports are not of the same documents.
    """
    pairs: dict[str | None, tuple[Sums, Sums]] = {None: (first.pooled, other.pooled)}
    own, others = first.domains, other.domains
    if own.keys() != others.keys():
        raise ValueError(f"reports of different domains: {', '.join(own)} and {', '.join(others)}")
    pairs |= {name: (sums, others[name]) for name, sums in own.items()}
    return {name: _differences(one, two, same_tokenizer) for name, (one, two) in pairs.items()}


def _differences(first: Sums, other: Sums, same_tokenizer: bool) -> Differences:
    a, b = first.totals, other.totals
    if (a.documents, a.bytes) != (b.documents, b.bytes):
        raise ValueError(
            f"reports of different documents: {a.documents} of {a.bytes} bytes and {b.documents} of {b.bytes} bytes"
        )
    by_byte = by_token = None
    if a.bytes and a.tokens and b.tokens:
        by_byte = Difference(
            b.bits_per_byte - a.bits_per_byte,
            interval(other.bits_per_byte - first.bits_per_byte, a.documents),
        )
    if same_tokenizer and a.tokens and b.tokens:
        by_token = Difference(b.loss - a.loss, interval(other.loss - first.loss, a.documents))
    return Differences(by_byte, by_token)
