"""``rwkv-train eval-ppl``: perplexity and bits per byte of text files."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.inference import (
    Checkpoint,
    Device,
    Dtype,
    DtypeName,
    TokenizerName,
    load_for_inference,
)
from rwkv_train.commands.tables import print_table
from rwkv_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rwkv_train.evaluation.totals import Report, Totals

CACHE_DIR = Path("~/.cache/rwkv-train")

Data = Annotated[
    list[str],
    typer.Option(
        metavar="FILE",
        help="Text to score: .jsonl, .jsonl.zst, .jsonl.gz or .txt; may be repeated. "
        "builtin: the validation text of the built-in corpus.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")]
Limit = Annotated[int | None, typer.Option(help="Score only this many documents, the first ones.")]
BatchSize = Annotated[int, typer.Option(help="Documents that are read side by side.")]
ChunkLen = Annotated[int, typer.Option(help="Tokens of each that are read at once; no limit to the context.")]
CacheDir = Annotated[Path, typer.Option(help="Folder of the built-in corpus.")]


def eval_ppl(
    checkpoint: Checkpoint,
    data: Data,
    tokenizer: TokenizerName = None,
    json_file: JsonFile = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    chunk_len: ChunkLen = 256,
    cache_dir: CacheDir = CACHE_DIR,
    device: Device = "auto",
    dtype: Dtype = DtypeName.FP32,
) -> None:
    """Measure how well a model predicts text, pooled and by domain, with the state carried through documents."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be at least 1")
    if json_file is not None:
        _require_writable(json_file)
    paths = [_find_file(name, cache_dir) for name in data]

    from rwkv_train.data.corpus import read_documents
    from rwkv_train.evaluation.perplexity import evaluate_documents

    model, text_tokenizer = load_for_inference(checkpoint, tokenizer, device, dtype)
    with _progress() as on_document:
        report = evaluate_documents(
            model,
            text_tokenizer,
            islice(read_documents(paths), limit),
            batch_size=batch_size,
            chunk_len=chunk_len,
            on_document=on_document,
        )
    identity = text_tokenizer.identity
    if json_file is not None:
        result = report.to_json() | {
            "checkpoint": checkpoint,
            "tokenizer": identity._asdict(),
            "data": data,
            "limit": limit,
        }
        _write(json_file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _print_table(report, identity.name)


def _require_writable(path: Path) -> None:
    """Find out before the long work, not after it."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path} cannot be written; give a file in a folder that can be")


def _write(path: Path, text: str) -> None:
    """Write a whole file or nothing; a device such as /dev/stdout is written to, not replaced."""
    from rwkv_train.checkpoints.io import new_file, resolve_target

    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with new_file(resolve_target(path), len(text)) as new:
        new.write_text(text, encoding="utf-8")


def _find_file(name: str, cache_dir: Path) -> Path:
    from rwkv_train.data.builtin import BUILTIN, builtin_folder, write_builtin_corpus

    if name == BUILTIN:
        return write_builtin_corpus(builtin_folder(cache_dir))["valid"]
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}; wanted a text file, or 'builtin'")
    return path


@contextmanager
def _progress() -> "Iterator[Callable[[Totals], None]]":
    """Show on stderr what is done so far, where it is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from rwkv_train.evaluation.totals import Totals

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the model and the text")
        total = Totals()

        def show(document: Totals) -> None:
            nonlocal total
            total += document
            numbers = (
                f"{total.documents:,} documents  {total.tokens:,} tokens  {total.bits_per_byte:.4f} bits/byte"
            )
            bar.update(task, description=numbers)

        yield show


def _print_table(report: "Report", tokenizer: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, caption=f"tokenizer: {tokenizer}")
    table.add_column("domain")
    for name in ("documents", "tokens", "bytes", "nats", "token ppl", "byte ppl", "bits/byte"):
        table.add_column(name, justify="right")
    for domain, totals in report.domains.items():
        table.add_row(domain, *_cells(totals))
    table.add_section()
    table.add_row("total", *_cells(report.total))
    print_table(table)


def _cells(totals: "Totals") -> list[str]:
    counts = (totals.documents, totals.tokens, totals.bytes)
    rates = (totals.token_ppl, totals.byte_ppl, totals.bits_per_byte)
    return [*(f"{count:,}" for count in counts), f"{totals.nats:,.1f}", *(f"{rate:.4f}" for rate in rates)]
