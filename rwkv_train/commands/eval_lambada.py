"""``rwkv-train eval-lambada``: perplexity and accuracy of last words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
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
from rwkv_train.commands.results import JsonFile, require_writable, write_json
from rwkv_train.commands.tables import print_table
from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.prefix import Prefix

if TYPE_CHECKING:
    from rwkv_train.evaluation.lambada import LambadaReport

Data = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="The passages, one JSON object a line with a 'text': lambada_test.jsonl, OpenAI's variant of 5153, is "
        "what published numbers are of. It does not come with rwkv-train.",
    ),
]
PrefixName = Annotated[
    Prefix,
    typer.Option(
        "--prefix",
        help="What the model reads before each passage. end-of-document: token 0, as RWKV-LM's scripts; newline: "
        "a line feed, as ChatRWKV's adapter to lm-evaluation-harness; none: nothing, as that harness by itself.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Score only this many passages, the first ones.")]
BatchSize = Annotated[int, typer.Option(help="Passages that are read side by side.")]
ChunkLen = Annotated[int, typer.Option(help="Tokens of each that are read at once; no limit to the context.")]


def eval_lambada(
    checkpoint: Checkpoint,
    data: Data,
    prefix: PrefixName = Prefix.END_OF_DOCUMENT,
    tokenizer: TokenizerName = None,
    json_file: JsonFile = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    chunk_len: ChunkLen = 256,
    device: Device = "auto",
    dtype: Dtype = DtypeName.FP32,
) -> None:
    """Measure how well a model guesses the last words of passages, by the protocol of RWKV's published numbers."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be at least 1")
    require_writable(json_file)

    from rwkv_train.data.corpus import read_documents
    from rwkv_train.evaluation.lambada import evaluate_lambada

    texts = [document.text for document in islice(read_documents([data]), limit)]
    model, text_tokenizer = load_for_inference(checkpoint, tokenizer, device, dtype)
    with _progress() as on_document:
        report = evaluate_lambada(
            model,
            text_tokenizer,
            texts,
            prefix=prefix,
            batch_size=batch_size,
            chunk_len=chunk_len,
            on_document=on_document,
        )
    identity = text_tokenizer.identity
    circumstances = {
        "checkpoint": checkpoint,
        "tokenizer": identity._asdict(),
        "prefix": prefix.value,
        "data": data,
        "limit": limit,
        "dtype": dtype.value,
    }
    # First what cannot fail for want of room on a disk.
    _print_report(report, f"prefix: {prefix}, tokenizer: {identity.name}")
    write_json(json_file, report.to_json() | circumstances)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how many passages are done, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("passages"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("passages", total=None)

        def show(n_done: int, n_all: int) -> None:
            bar.update(task, completed=n_done, total=n_all)

        yield show


def _print_report(report: "LambadaReport", caption: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, caption=caption)
    for name in ("documents", "word ppl", "95 % interval", "accuracy", "95 % interval"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{report.documents:,}",
        _ppl(report.ppl),
        "-" if report.ppl_interval is None else " to ".join(map(_ppl, report.ppl_interval)),
        f"{report.accuracy:.2%}",
        " to ".join(f"{share:.2%}" for share in report.accuracy_interval),
    )
    print_table(table)


def _ppl(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"  # of a model that has learnt nothing yet
