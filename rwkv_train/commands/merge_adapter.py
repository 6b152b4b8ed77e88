"""``rwkv-train merge-adapter``: a base and the adapter that was trained beside it as one set of weights."""

from pathlib import Path
from typing import Annotated

import typer

from rwkv_train.commands.convert_checkpoint import (
    AsJson,
    Block0,
    Dtype,
    Target,
    Unused,
    report,
    stored_dtype,
)
from rwkv_train.commands.inference import ADAPTER_HELP, CHECKPOINT_HELP

Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help=f"The weights that the adapter was trained on. {CHECKPOINT_HELP}"),
]
AdapterPath = Annotated[str, typer.Argument(metavar="ADAPTER", help=ADAPTER_HELP)]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="What to write: a file for pth and gguf, else a folder.")
]
To = Annotated[Target, typer.Option(help="Format to write, as of convert-checkpoint.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT, once the new one is written and compared.")
]
UncheckedBase = Annotated[
    bool,
    typer.Option(
        "--unchecked-base",
        help="Also take an adapter of another program, which does not say what its base is.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Read both, check all but values, say what would be written; write nothing."
    ),
]


def merge_adapter(
    base: Base,
    adapter: AdapterPath,
    out: Out,
    to: To = Target.PTH,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    unchecked_base: UncheckedBase = False,
    v7_block0: Block0 = Unused.KEEP,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base: weights that give alone what the two give together."""
    from rwkv_train.checkpoints import convert

    merged = convert(
        base,
        out,
        to.value,
        dtype=stored_dtype(to, dtype),
        overwrite=overwrite,
        v7_block0=v7_block0.value,
        dry_run=dry_run,
        adapter=adapter,
        unchecked_base=unchecked_base,
    )
    report(merged, as_json=as_json)
