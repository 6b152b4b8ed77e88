"""``rwkv-train prepare-data``: text files to tokens on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.errors import DataError

if TYPE_CHECKING:
    from rwkv_train.data.prepare import PreparedSummary, Progress

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="FILE",
        help="Text to prepare: .jsonl, .jsonl.zst, .jsonl.gz or .txt; repeatable. Or 'builtin', the text that "
        "ships with Python.",
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
        help="Write PREFIX.bin, PREFIX.idx, PREFIX.docs.npy and PREFIX.json; for 'builtin' the text "
        "PREFIX-train.jsonl.zst and its tokens PREFIX-train.*, and the same with PREFIX-valid.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def prepare_data(
    inputs: Inputs, tokenizer: TokenizerName, output: Output, overwrite: Overwrite = False
) -> None:
    """Turn text into a tokenized corpus on disk, for data.train and data.valid."""
    from rwkv_train.data import builtin, prepare
    from rwkv_train.tokenizers import load_tokenizer

    if builtin.BUILTIN in inputs and len(inputs) > 1:
        raise DataError("--input builtin stands alone: prepare other files under another --output")
    if builtin.BUILTIN in inputs:
        summaries = builtin.prepare_builtin(
            output.expanduser(), load_tokenizer(tokenizer), overwrite=overwrite
        )
        for summary in summaries.values():
            _print_summary(summary)
        return
    paths = [Path(name).expanduser() for name in inputs]
    text_tokenizer = load_tokenizer(tokenizer)
    with _progress_bar(paths) as progress:
        summary = prepare.prepare_data(
            paths, text_tokenizer, output.expanduser(), overwrite=overwrite, progress=progress
        )
    _print_summary(summary)


@contextmanager
def _progress_bar(paths: list[Path]) -> Iterator["Progress"]:
    """Show how much of the files is read, how fast, and the time left, on stderr."""
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
        # A missing file has no size here; the library says so in its own sentence.
        total = sum(path.stat().st_size for path in paths if path.is_file())
        task = bar.add_task("tokenizing", total=total)
        yield lambda n_bytes: bar.advance(task, n_bytes)


def _print_summary(summary: "PreparedSummary") -> None:
    from rich.console import Console
    from rich.table import Table

    sidecar = summary.sidecar
    table = Table(title=str(summary.prefix), title_justify="left")
    table.add_column("domain")
    for name in ("documents", "tokens", "bytes"):
        table.add_column(name, justify="right")
    totals = ("total", sidecar.n_documents, sidecar.n_tokens, sidecar.n_bytes)
    for index, (domain, *counts) in enumerate([*sidecar.domains, totals]):
        is_last_domain = index == len(sidecar.domains) - 1
        table.add_row(domain, *(f"{count:,}" for count in counts), end_section=is_last_domain)
    Console().print(table)
    if sidecar.n_skipped_empty:
        typer.echo(f"skipped, because without text: {sidecar.n_skipped_empty:,} documents")
