"""``rwkv-train eval-ppl``: perplexity and bits per byte of text, of one model or of several beside each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv_train.commands.inference import (
    ADAPTER_HELP,
    CHECKPOINT_HELP,
    STATE_HELP,
    Device,
    Dtype,
    DtypeName,
    find_devices,
)
from rwkv_train.commands.perplexity_tables import (
    name_of,
    print_curves,
    print_scores,
    shorten,
    tokenizers_differ,
)
from rwkv_train.commands.prepare_data import (
    DatasetConfig,
    DatasetSplit,
    DomainColumn,
    Format,
    PairTokenizer,
    SkipBadLines,
    Streaming,
    TextColumn,
)
from rwkv_train.commands.results import JsonFile, require_writable, write_json, write_whole
from rwkv_train.errors import ConfigError, RwkvTrainError
from rwkv_train.evaluation.modes import Mode

if TYPE_CHECKING:
    from rwkv_train.evaluation.job import Evaluation, PrefixChoice
    from rwkv_train.evaluation.totals import Totals

CACHE_DIR = Path("~/.cache/rwkv-train")
LEGEND_WIDTH = 48
"""Characters of a checkpoint's path in the picture."""

_PICTURES = (".png", ".svg")

Checkpoints = Annotated[
    list[str],
    typer.Option(
        "--checkpoint",
        metavar="PATH",
        help=f"{CHECKPOINT_HELP} Repeat it to compare models with the first.",
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        metavar="INPUT",
        help="Text to score; repeatable: all that prepare-data reads. builtin: the validation text of the built-in "
        "corpus.",
    ),
]
ModeName = Annotated[
    Mode,
    typer.Option(
        help="What is known when a token is predicted. stateful: all of its document before it. windowed: what stands "
        "before it in a window of --window tokens, as lm-evaluation-harness reads. stream: all of the data before it."
    ),
]
Window = Annotated[int | None, typer.Option(metavar="N", help="Tokens of a window, for --mode windowed.")]
PrefixToken = Annotated[
    str | None,
    typer.Option(
        metavar="ID|none",
        help="Token that is read before each document; by default the tokenizer's end of a document. none: nothing, "
        "and the first token of a document is not scored.",
    ),
]
Tokenizers = Annotated[
    list[str] | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="bytes, world, neox or the path of a tokenizer.json; by default the one the checkpoint names. Repeat it "
        "to give each --checkpoint its own, in their order.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="PATH|none",
        help=f"Merge an adapter into the model. {ADAPTER_HELP} Give it once for each --checkpoint, in their order; "
        "none: that one has none.",
    ),
]
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="FILE|none",
        help=f"{STATE_HELP} Repeat it to give each --checkpoint its own, in their order; none: the empty state.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Score only this many documents, the first ones.")]
BatchSize = Annotated[int, typer.Option(help="Documents that are read side by side.")]
ChunkLen = Annotated[int, typer.Option(help="Tokens of each that are read at once; no limit to the context.")]
Devices = Annotated[
    int, typer.Option(metavar="N", help="Processes that share the documents, each on a GPU of its own.")
]
MinLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Loss by position: over documents of at least N tokens, a power of two. By default the longest that one "
        "document in ten has.",
    ),
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw loss by position here, .png or .svg."),
]
CacheDir = Annotated[Path, typer.Option(help="Folder of the built-in corpus.")]


def eval_ppl(
    checkpoint: Checkpoints,
    data: Data,
    data_format: Format = None,
    text_column: TextColumn = "text",
    domain_column: DomainColumn = None,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    streaming: Streaming = False,
    pair_tokenizer: PairTokenizer = None,
    skip_bad_lines: SkipBadLines = False,
    limit: Limit = None,
    mode: ModeName = Mode.STATEFUL,
    window: Window = None,
    prefix_token: PrefixToken = None,
    tokenizer: Tokenizers = None,
    state: States = None,
    min_length: MinLength = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    batch_size: BatchSize = 8,
    chunk_len: ChunkLen = 256,
    device: Device = "auto",
    devices: Devices = 1,
    dtype: Dtype = DtypeName.FP32,
    cache_dir: CacheDir = CACHE_DIR,
    adapter: Adapters = None,
) -> None:
    """Measure how well models predict text: perplexity and bits per byte, pooled and by domain, with intervals."""
    require_writable(json_file)
    _require_picture(plot_file)
    prefix = _parse_prefix(prefix_token)
    tokenizers = _one_for_each("--tokenizer", tokenizer or [], len(checkpoint))
    states = _one_for_each("--state", state or [], len(checkpoint))
    adapters = _adapter_of_each(adapter or [], len(checkpoint))

    from rwkv_train.checkpoints.tensors import DTYPES
    from rwkv_train.data.sources.base import SourceOptions
    from rwkv_train.evaluation.job import Job
    from rwkv_train.evaluation.positions import require_power_of_two
    from rwkv_train.evaluation.sharing import evaluate_checkpoint
    from rwkv_train.evaluation.side_by_side import curves_of, results_of

    if min_length is not None:
        require_power_of_two(min_length)
    inputs = tuple(str(_find_input(name, cache_dir)) for name in data)
    options = SourceOptions(
        format=data_format,
        text_column=text_column,
        domain_column=domain_column,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        dataset_streaming=streaming,
        pair_tokenizer=pair_tokenizer,
    )
    jobs = [
        Job(
            checkpoint=path,
            data=inputs,
            tokenizer=name,
            state=None if start == "none" else start,
            options=options,
            skip_bad=skip_bad_lines,
            limit=limit,
            mode=mode,
            window=window,
            prefix=prefix,
            batch_size=batch_size,
            chunk_len=chunk_len,
            dtype=DTYPES[dtype.value],
            adapter=merged,
        )
        for path, name, merged, start in zip(checkpoint, tokenizers, adapters, states, strict=True)
    ]
    jobs[0].require_consistent(devices)
    places = find_devices(device, devices)
    for job in jobs[1:]:
        job.require_readable()  # not after the first one's long work
    circumstances = {
        "data": data,
        "mode": mode.value,
        "window": window,
        "limit": limit,
        "dtype": dtype.value,
    }
    evaluations: list[Evaluation] = []

    def report() -> None:
        results = results_of(jobs[: len(evaluations)], evaluations)
        try:
            print_scores(results, f"windows of {window} tokens" if window is not None else mode.value)
            curves = curves_of(evaluations, min_length)
            print_curves(curves, n_documents=results[0]["total"]["documents"])
            if plot_file is not None:
                from rwkv_train.evaluation.curve_plot import draw_curves

                picture = draw_curves(dict(zip(_legend(results), curves, strict=True)), plot_file.suffix[1:])
                write_whole(plot_file, picture)
        finally:  # a curve that cannot be had, or a closed pipe, costs nothing else of the long work
            write_json(json_file, {"checkpoints": results, **circumstances})

    try:
        for number, job in enumerate(jobs):
            with _progress(f"[{number + 1}/{len(jobs)}] " if len(jobs) > 1 else "") as on_document:
                evaluations.append(evaluate_checkpoint(job, places, on_document=on_document))
    except BaseException:  # Ctrl-C too: the models that are done took long
        if evaluations:
            _report_the_done(report, [job.checkpoint for job in jobs], len(evaluations))
        raise
    report()


def _report_the_done(report: Callable[[], None], checkpoints: list[str], n_done: int) -> None:
    """Report all models before the one that has just failed, whose error is what ends the command."""
    name = f"[{n_done + 1}] {checkpoints[n_done]}"
    typer.echo(f"{name} could not be scored to its end; the report is of those before it", err=True)
    try:
        report()
    except (RwkvTrainError, OSError) as error:
        typer.echo(f"error: {error}", err=True)


def _require_picture(path: Path | None) -> None:
    if path is not None and path.suffix not in _PICTURES:
        raise ConfigError(
            f"--plot {path} must end in {' or '.join(_PICTURES)}, which says the kind of picture"
        )
    require_writable(path, "--plot")


def _parse_prefix(given: str | None) -> "PrefixChoice":
    if given is None:
        return "end"
    if given == "none":
        return "none"
    if not given.isascii() or not given.isdigit():
        raise ConfigError(f"--prefix-token is '{given}'; wanted the id of a token, or none")
    return int(given)


def _one_for_each(option: str, values: list[str], n_checkpoints: int) -> Sequence[str | None]:
    if len(values) > 1 and len(values) != n_checkpoints:
        raise ConfigError(
            f"{option} is given {len(values)} times for {n_checkpoints} checkpoints; give it once for all, or once for "
            "each --checkpoint in their order"
        )
    return values if len(values) > 1 else [values[0] if values else None] * n_checkpoints


def _adapter_of_each(adapters: list[str], n_checkpoints: int) -> Sequence[str | None]:
    if adapters and len(adapters) != n_checkpoints:
        raise ConfigError(
            f"--adapter is given {len(adapters)} times for {n_checkpoints} checkpoints; give it once for each "
            "--checkpoint in their order, none for one without"
        )
    return [None if path == "none" else path for path in adapters] or [None] * n_checkpoints


def _find_input(name: str, cache_dir: Path) -> str | Path:
    from rwkv_train.data.builtin import BUILTIN, builtin_folder, write_builtin_corpus

    if name == BUILTIN:
        return write_builtin_corpus(builtin_folder(cache_dir))["valid"]
    return Path(name).expanduser() if name.startswith("~") else name


@contextmanager
def _progress(title: str) -> "Iterator[Callable[[Totals], None]]":
    """Show on stderr what is done so far, where it is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from rwkv_train.evaluation.totals import Totals

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{title}reading the model and the text")
        total = Totals()

        def show(document: Totals) -> None:
            nonlocal total
            total += document
            rate = f"  {total.bits_per_byte:.4f} bits/byte" if total.bytes else ""
            numbers = f"{title}{total.documents:,} documents  {total.tokens:,} tokens{rate}"
            bar.update(task, description=numbers)

        yield show


def _legend(results: list[dict[str, Any]]) -> list[str]:
    """Return a short name for each line of the picture, numbered as the tables are."""
    names = [f"[{n}] {shorten(name_of(result), LEGEND_WIDTH)}" for n, result in enumerate(results, start=1)]
    if not tokenizers_differ(results):
        return names
    return [f"{name} ({result['tokenizer']['name']})" for name, result in zip(names, results, strict=True)]
