"""The result of ``eval-ppl`` as tables: of one model within 100 columns, of several within 120."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from rwkv_train.commands.tables import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from rwkv_train.evaluation.positions import Curve

NONE = "-"
DOMAIN_WIDTH = 24
"""Characters of a domain's name; files that are domains may have very long ones."""
SHOWN_DOMAINS = 40
"""Rows of a table, as prepare-data has; those with the most text."""

_TOTAL = "total"


def print_scores(results: Sequence[Mapping[str, Any]], reading: str) -> None:
    """Print what was found of one model, or of several beside each other.

    Args:
        results: of each model, as ``--json`` has them.
        reading: how the documents were read.
    """
    first = results[0]
    shown = _largest(first["domains"])
    n_more = len(first["domains"]) - len(shown)
    more = (
        f"\ndomains beyond the {SHOWN_DOMAINS} largest: {n_more:,}; they are in the total, and --json has all"
        if n_more
        else ""
    )
    if len(results) == 1:
        _print_counts(first["total"], shown)
        typer.echo()
        _print_rates(first["total"], shown)
        if more:
            typer.echo(more)
        typer.echo(f"\ntokenizer: {first['tokenizer']['name']}; read: {reading}; {_prefix_line(first)}")
        return
    for number, result in enumerate(results, start=1):
        name = result["tokenizer"]["name"]
        typer.echo(f"[{number}] {name_of(result)} (tokenizer: {name}; {_prefix_line(result)})")
    total = first["total"]
    typer.echo(f"{total['documents']:,} documents, {total['bytes']:,} bytes; read: {reading}\n")
    _print_comparison(results, list(shown))
    if more:
        typer.echo(more)
    if tokenizers_differ(results):
        typer.echo("\nThe tokenizers differ: bits per byte compare, loss and perplexity of a token do not.")


def name_of(result: Mapping[str, Any]) -> str:
    """Return what a model is called: its checkpoint, and the adapter that is merged into it."""
    return (
        f"{result['checkpoint']} + {result['adapter']}" if "adapter" in result else str(result["checkpoint"])
    )


def print_curves(curves: Sequence["Curve"], n_documents: int) -> None:
    """Print loss by position, a column for each model.

    Args:
        curves: of each model, over one length.
        n_documents: all that were scored.
    """
    typer.echo(f"\nnats per token by position, in {curves[0].documents:,} of {n_documents:,} documents:")
    heads = ["loss/token"] if len(curves) == 1 else [f"[{number + 1}]" for number in range(len(curves))]
    table = _table("position", *heads)
    for index, bucket in enumerate(curves[0].buckets):
        table.add_row(bucket.label, *(_fixed(curve.buckets[index].loss) for curve in curves))
    print_table(table)


def tokenizers_differ(results: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the models have different tokens, so that rates per token do not compare."""
    return len({result["tokenizer"]["sha256"] for result in results}) > 1


def shorten(name: str, width: int) -> str:
    """Return a name on one line of at most so many characters; of a longer one its start and its longer end.

    Example:
        >>> shorten("runs/of/a/long/path/step-100", 16)
        'runs…th/step-100'
    """
    name = "".join(character if character.isprintable() else "\ufffd" for character in name)
    start = width // 4
    return name if len(name) <= width else f"{name[:start]}…{name[start + 1 - width :]}"


def _largest(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the domains with the most bytes, in their order."""
    by_size = sorted(domains, key=lambda name: domains[name]["bytes"], reverse=True)
    kept = set(by_size[:SHOWN_DOMAINS])
    return {name: row for name, row in domains.items() if name in kept}


def _print_counts(total: Mapping[str, Any], domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what was scored."""
    table = _table("domain", "documents", "tokens", "bytes", "words", "nats")
    for index, (domain, row) in enumerate([*domains.items(), (_TOTAL, total)]):
        counts = (f"{row[name]:,}" for name in ("documents", "tokens", "bytes", "words"))
        table.add_row(
            _row_name(domain), *counts, f"{row['nats']:,.1f}", end_section=index == len(domains) - 1
        )
    print_table(table)


def _print_rates(total: Mapping[str, Any], domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the rates of one model."""
    table = _table("domain", "loss/token", "token ppl", "word ppl", "byte ppl", "bits/byte", "95 % interval")
    for index, (domain, row) in enumerate([*domains.items(), (_TOTAL, total)]):
        table.add_row(
            _row_name(domain),
            _fixed(row["loss"]),
            *(_ppl(row[name]) for name in ("token_ppl", "word_ppl", "byte_ppl")),
            _fixed(row["bits_per_byte"]),
            _interval(row["bits_per_byte_interval"]),
            end_section=index == len(domains) - 1,
        )
    print_table(table)


def _print_comparison(results: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> None:
    """Print the models under each other, domain by domain, each with its difference to the first."""
    table = _table(
        "domain", "", "loss/token", "token ppl", "bits/byte", "95 % interval", "difference", "95 % interval"
    )
    for domain in [*domains, None]:
        for number, result in enumerate(results):
            row = result["total"] if domain is None else result["domains"][domain]
            compared = result["difference_to_first"]
            part = compared and (compared["total"] if domain is None else compared["domains"][domain])
            difference = part["bits_per_byte"] if part else None
            table.add_row(
                "" if number else _row_name(domain or _TOTAL),
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


def _table(first: str, *columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row_name(domain: str) -> str:
    return shorten(domain, DOMAIN_WIDTH)


def _prefix_line(result: Mapping[str, Any]) -> str:
    start = f"from the state {result['state']}; " if result["state"] is not None else ""
    if result["prefix_token"] is None:
        return f"{start}no prefix, so the first token of each document is not scored"
    return f"{start}read before a document: token {result['prefix_token']}"


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"


def _ppl(value: float | None) -> str:
    """Show a perplexity, which may be of any size: that of a word of an untrained model has 20 digits."""
    return NONE if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.3g}"


def _interval(ends: tuple[float, float] | None, show: Any = _fixed) -> str:
    return NONE if ends is None else f"{show(ends[0])} {show(ends[1])}"
