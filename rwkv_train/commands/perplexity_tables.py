"""The result of ``eval-ppl`` as tables that fit a terminal of 100 columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rwkv_train.commands.tables import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from rwkv_train.evaluation.positions import Curve

NONE = "-"
_TOTAL = "total"


def print_counts(total: Mapping[str, Any], domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what was scored."""
    table = _table("domain", "documents", "tokens", "bytes", "words", "nats")
    for index, (domain, row) in enumerate([*domains.items(), (_TOTAL, total)]):
        counts = (f"{row[name]:,}" for name in ("documents", "tokens", "bytes", "words"))
        table.add_row(domain, *counts, f"{row['nats']:,.1f}", end_section=index == len(domains) - 1)
    print_table(table)


def print_rates(total: Mapping[str, Any], domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the rates of one model."""
    table = _table("domain", "loss/token", "token ppl", "word ppl", "byte ppl", "bits/byte", "95 % interval")
    for index, (domain, row) in enumerate([*domains.items(), (_TOTAL, total)]):
        table.add_row(
            domain,
            _fixed(row["loss"]),
            *(_ppl(row[name]) for name in ("token_ppl", "word_ppl", "byte_ppl")),
            _fixed(row["bits_per_byte"]),
            _interval(row["bits_per_byte_interval"]),
            end_section=index == len(domains) - 1,
        )
    print_table(table)


def print_comparison(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the models under each other, domain by domain, each with its difference to the first."""
    table = _table(
        "domain", "", "loss/token", "token ppl", "bits/byte", "95 % interval", "difference", "95 % interval"
    )
    first = results[0]
    for domain in [*first["domains"], None]:
        for number, result in enumerate(results):
            row = result["total"] if domain is None else result["domains"][domain]
            compared = result["difference_to_first"]
            part = compared and (compared["total"] if domain is None else compared["domains"][domain])
            difference = part["bits_per_byte"] if part else None
            table.add_row(
                "" if number else domain or _TOTAL,
                f"[{number + 1}]",
                _fixed(row["loss"]),
                _ppl(row["token_ppl"]),
                _fixed(row["bits_per_byte"]),
                _interval(row["bits_per_byte_interval"]),
                _signed(difference and difference["value"]),
                _interval(difference and difference["interval"], _signed),
                end_section=number == len(results) - 1,
            )
    print_table(table)


def print_curves(curves: Mapping[str, "Curve"]) -> None:
    """Print loss by position, a column for each model."""
    table = _table("position", *curves)
    first = next(iter(curves.values()))
    for index, bucket in enumerate(first.buckets):
        table.add_row(bucket.label, *(_fixed(curve.buckets[index].loss) for curve in curves.values()))
    print_table(table)


def _table(first: str, *columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"


def _ppl(value: float | None) -> str:
    """Show a perplexity, which may be of any size: that of a word of an untrained model has 20 digits."""
    return NONE if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.3g}"


def _interval(ends: tuple[float, float] | None, show: Any = _fixed) -> str:
    return NONE if ends is None else f"{show(ends[0])} {show(ends[1])}"
