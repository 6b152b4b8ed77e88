"""``rwkv-train prepare-data``: text of any kind to tokens on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.errors import DataError

if TYPE_CHECKING:
    from rwkv_train.data.preparation.progress import Progress
    from rwkv_train.data.prepare import PreparedSummary


class Dedup(StrEnum):
    """Which documents are duplicates."""

    EXACT = "exact"
    MINHASH = "minhash"


_SHOWN_DOMAINS = 40
"""Rows of the table; the sidecar has all."""

_READ, _CHOOSE = "How the inputs are read", "Which documents are kept"

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="INPUT",
        help="Text to prepare; repeatable: .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .csv, .tsv, .txt, .md, a folder of "
        "such files, hf:NAME for a Hugging Face dataset (on the hub or a folder), or a .bin/.idx pair. Or 'builtin', "
        "the text that ships with Python.",
    ),
]
TokenizerName = Annotated[
    str,
    typer.Option("--tokenizer", metavar="NAME", help="bytes, world, neox, or the path of a tokenizer.json."),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        metavar="PREFIX",
        help="Write PREFIX.bin, PREFIX.idx, PREFIX.docs.npy and PREFIX.json; with --valid-fraction PREFIX-train.* and "
        "PREFIX-valid.*; for 'builtin' also the text, PREFIX-train.jsonl.zst and PREFIX-valid.jsonl.zst.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        rich_help_panel=_READ,
        help="jsonl, json (one list), text, parquet, csv or pair, where the ending does not tell.",
    ),
]
TextColumn = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=_READ, help="Key or column that holds the text.")
]
DomainColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_READ,
        help="Key or column that holds the domain. By default meta.pile_set_name, where there is one.",
    ),
]
DatasetConfig = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_READ, help="Configuration of an hf: dataset."),
]
DatasetSplit = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=_READ, help="Split of an hf: dataset.")
]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming", rich_help_panel=_READ, help="Read an hf: dataset without downloading it first."
    ),
]
PairTokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=_READ, help="What made a .bin/.idx pair that has no PREFIX.json."
    ),
]
SkipBadLines = Annotated[
    bool,
    typer.Option(
        "--skip-bad-lines",
        rich_help_panel=_READ,
        help="Count and report records that cannot be used, instead of ending at the first one.",
    ),
]
Domains = Annotated[
    str | None,
    typer.Option(metavar="A,B", rich_help_panel=_CHOOSE, help="Take documents of these domains only."),
]
Duplicates = Annotated[
    Dedup | None,
    typer.Option(
        "--dedup",
        rich_help_panel=_CHOOSE,
        help="Of documents with the same text, or nearly the same (80 % of the 5-word windows), keep the first. "
        r"minhash needs rwkv-train\[dedup].",  # not escaped, brackets are markup
    ),
]
ValidFraction = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        rich_help_panel=_CHOOSE,
        help="Hold out this share of the documents, by the hash of their text.",
    ),
]
MaxLeak = Annotated[
    float,
    typer.Option(
        metavar="F",
        rich_help_panel=_CHOOSE,
        help="Leave out held-out documents of which training has more than this share of the 16-word probes; "
        "1: do not look.",
    ),
]
Shuffle = Annotated[
    int | None,
    typer.Option(
        metavar="SEED", rich_help_panel=_CHOOSE, help="Write the documents in an order drawn by this seed."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes that tokenize. By default one a core, fewer for small inputs. The result is the same.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that exist, and unfinished work of other settings.")
]


def prepare_data(
    inputs: Inputs,
    tokenizer: TokenizerName,
    output: Output,
    format: Format = None,  # noqa: A002 - the option's name
    text_column: TextColumn = "text",
    domain_column: DomainColumn = None,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    streaming: Streaming = False,
    pair_tokenizer: PairTokenizer = None,
    skip_bad_lines: SkipBadLines = False,
    domains: Domains = None,
    dedup: Duplicates = None,
    valid_fraction: ValidFraction = None,
    max_leak: MaxLeak = 0.1,
    shuffle: Shuffle = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn text into a tokenized corpus on disk, for data.train and data.valid.

    Stopped at any time, the same command goes on where it was.
    """
    from rwkv_train.data import builtin, prepare
    from rwkv_train.data.preparation.options import PrepareOptions
    from rwkv_train.data.preparation.work_folder import SUFFIX
    from rwkv_train.data.sources.base import SourceOptions
    from rwkv_train.tokenizers import load_tokenizer

    output = output.expanduser()
    options = PrepareOptions(
        source=SourceOptions(
            format=format,
            text_column=text_column,
            domain_column=domain_column,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            dataset_streaming=streaming,
            pair_tokenizer=pair_tokenizer,
        ),
        domains=None
        if domains is None
        else tuple(name for one in domains.split(",") if (name := one.strip())),
        skip_bad=skip_bad_lines,
        dedup=dedup.value if dedup else None,
        valid_fraction=valid_fraction,
        max_leak=max_leak,
        shuffle=shuffle,
    )
    if builtin.BUILTIN in inputs:
        if len(inputs) > 1:
            raise DataError("--input builtin stands alone: prepare other files under another --output")
        if options != PrepareOptions() or workers is not None:
            raise DataError("--input builtin takes no options but --tokenizer, --output and --overwrite")
        for summary in builtin.prepare_builtin(
            output, load_tokenizer(tokenizer), overwrite=overwrite
        ).values():
            _print_summary(summary)
        return
    text_tokenizer = load_tokenizer(tokenizer)
    try:
        with _progress_bar() as progress:
            summaries = prepare.prepare_data(
                inputs,
                text_tokenizer,
                output,
                options,
                workers=workers,
                overwrite=overwrite,
                progress=progress,
            )
    except (KeyboardInterrupt, SystemExit):
        if (unfinished := output.with_name(output.name + SUFFIX)).exists():
            typer.echo(f"{unfinished} keeps what is done; the same command goes on from there", err=True)
        raise
    for summary in summaries:
        _print_summary(summary)
    _print_left_out(summaries[0])


@contextmanager
def _progress_bar() -> Iterator["Progress"]:
    """Show on stderr what is done, how much of the inputs is read, how fast, and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)

        class _Bar:
            def begin(self, stage: str, n_bytes: int | None) -> None:
                bar.update(task, description=stage, refresh=True)
                if n_bytes is not None:  # the bytes of the inputs stay in view to the end
                    bar.update(task, total=n_bytes)

            def advance(self, n_bytes: int) -> None:
                bar.advance(task, n_bytes)

        yield _Bar()
        bar.update(task, description="done")


def _print_summary(summary: "PreparedSummary") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rwkv_train.data.sources.base import show_path

    sidecar = summary.sidecar
    table = Table(title=Text(show_path(summary.prefix)), title_justify="left")
    table.add_column("domain")
    for name in ("documents", "tokens", "bytes", "words"):
        table.add_column(name, justify="right")
    totals = ("total", sidecar.n_documents, sidecar.n_tokens, sidecar.n_bytes, sidecar.n_words)
    rows: list[tuple[str, *tuple[int | None, ...]]] = [*sidecar.domains[:_SHOWN_DOMAINS]]
    if rest := sidecar.domains[_SHOWN_DOMAINS:]:
        sums = [sum(counts) for counts in zip(*(domain[1:] for domain in rest), strict=True)]
        rows.append((f"{len(rest):,} others", *sums))
    for index, (domain, *counts) in enumerate([*rows, totals]):
        # Text: a name may hold what would be markup.
        table.add_row(Text(domain), *(f"{count:,}" for count in counts), end_section=index == len(rows) - 1)
    Console().print(table)


def _print_left_out(summary: "PreparedSummary") -> None:
    """Say what of the inputs is in no part; the sidecar of each part tells of all of it."""
    sidecar, preparation = summary.sidecar, summary.sidecar.preparation
    if sidecar.n_skipped_empty:
        typer.echo(f"skipped, because without text: {sidecar.n_skipped_empty:,} documents")
    if n_files := sum(source.n_without_records for source in sidecar.sources):
        typer.echo(f"passed over, because without records: {n_files:,} files")
    if preparation.n_skipped_bad:
        typer.echo(f"skipped, because they cannot be used: {preparation.n_skipped_bad:,} records; the first:")
        for record in preparation.first_bad:
            typer.echo(f"  {record}")
    for what, counts in (
        ("because an earlier document is the same", preparation.n_duplicates),
        ("because training has much of them", preparation.n_leaked),
    ):
        if counts:
            by_domain = ", ".join(f"{domain} {count:,}" for domain, count in counts.items())
            typer.echo(f"left out, {what}: {sum(counts.values()):,} documents ({by_domain})")
