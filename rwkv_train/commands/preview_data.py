"""``rwkv-train preview-data``: what a run on chat data would see, and what it would learn of it."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from rwkv_train.data.instruct.preview import DatasetSummary, Preview, PreviewSample

Config = Annotated[
    str,
    typer.Option(
        "--config", metavar="FILE", help="Settings with a section data, or a preset of configs/finetune."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one setting, e.g. data.learn=all; repeatable."),
]
Samples = Annotated[int, typer.Option("--samples", min=0, metavar="N", help="Samples to show.")]
Records = Annotated[
    int | None,
    typer.Option("--records", min=1, metavar="N", help="Read only the first N records of each dataset."),
]
Seed = Annotated[int, typer.Option("--seed", help="Show the first samples of the order of this seed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

# Data must not steer the terminal: of the control characters only line ends and tabs are written as they are.
_SHOWN_CONTROLS = {
    code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def preview_data(
    config: Config,
    overrides: Overrides = None,
    samples: Samples = 3,
    records: Records = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show samples of chat data with the part that is learned in green, token counts, and what is left out and why."""
    from rwkv_train.config.load import load_chat_data

    settings, ctx_len = load_chat_data(config, overrides or [])
    from rwkv_train.data.instruct.preview import make_preview

    preview = make_preview(settings, ctx_len, n_samples=samples, max_records=records, seed=seed)
    if as_json:
        typer.echo(json.dumps(preview.as_json(), ensure_ascii=False))
        return
    _print(preview)


def _print(preview: "Preview") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rwkv_train.commands.tables import print_table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    number = -1
    for sample in preview.samples:
        number += sample.side != "rejected"  # the other side of the same sample
        side = f", {sample.side}" if sample.side else ""
        console.print(Text(f"sample {number}{side}: {sample.where}", style="bold"))
        console.print(Text(f"{sample.n_tokens:,} tokens, {sample.n_learned:,} learned", style="bold"))
        console.print(_colored(sample, marks_learned=not console.is_terminal), end="\n\n")
    table = Table()
    for name in ("dataset", "weight", "records", "kept", "tokens", "learned", "longest", "in segments"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    weights = [f"{dataset.weight:g}" for dataset in preview.datasets] + ["held out"] * len(preview.held_out)
    for dataset, weight in zip((*preview.datasets, *preview.held_out), weights, strict=True):
        numbers = (dataset.n_records, dataset.n_kept, dataset.n_tokens, dataset.n_learned, dataset.longest)
        table.add_row(
            Text(dataset.path),
            weight,
            *(f"{number:,}" for number in (*numbers, dataset.n_segmented)),
        )
    print_table(table)
    bins = ", ".join(f"up to {limit:,}: {count:,}" for limit, count in preview.histogram)
    console.print(f"conversations by tokens: {bins}")
    filled = preview.n_tokens / (preview.n_rows * preview.ctx_len)
    console.print(f"packed in rows of {preview.ctx_len:,} tokens: {preview.n_rows:,}, {filled:.1%} filled")
    for dataset in (*preview.datasets, *preview.held_out):
        for line in _remarks(dataset):
            console.print(line)


def _colored(sample: "PreviewSample", *, marks_learned: bool) -> "Text":
    """Write learned text green and the rest dim; between angle quotes where there are no colours."""
    from rich.text import Text

    text = Text()
    for span in sample.spans:
        shown = "[end]" if span.is_end else span.text.translate(_SHOWN_CONTROLS)
        if span.is_learned and marks_learned:
            shown = f"«{shown}»"
        text.append(shown, style="green" if span.is_learned else "dim")
    return text


def _remarks(dataset: "DatasetSummary") -> list[str]:
    lines = []
    for reason, count in dataset.left_out.items():
        lines.append(f"{dataset.path}: left out {count:,} of {dataset.n_records:,}: {reason}, such as")
        lines += [f"  {example}" for example in dataset.examples[reason]]
    if dataset.n_cut_otherwise:
        lines.append(
            f"{dataset.path}: {dataset.n_cut_otherwise:,} of {dataset.n_kept:,} samples have other tokens than "
            "their whole text: an answer begins a token of its own, as it does after a prompt"
        )
    return lines
