"""``rwkv-train convert-checkpoint``: weights from any format that is read to one that is written."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.inference import CHECKPOINT_HELP
from rwkv_train.errors import ConfigError

if TYPE_CHECKING:
    from rwkv_train.checkpoints import Conversion
    from rwkv_train.checkpoints.writing import StoredDtype


class Target(StrEnum):
    """Formats that are written."""

    PTH = "pth"
    SAFETENSORS = "safetensors"
    HF = "hf"
    HF_REMOTE = "hf-remote"
    GGUF = "gguf"


class _Source(StrEnum):
    PTH = "pth"
    SAFETENSORS = "safetensors"
    HF = "hf"
    TRAINING = "training"
    DEEPSPEED = "deepspeed"
    LIGHTNING = "lightning"


class StoredDtypeName(StrEnum):
    """What weights may be rounded to in a file."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    Q8_0 = "q8_0"


class Unused(StrEnum):
    """What becomes of tensors that the model does not use."""

    KEEP = "keep"
    DROP = "drop"
    FILL = "fill"


_SOURCE_HELP = f"{CHECKPOINT_HELP} Also a checkpoint folder of DeepSpeed, or a .ckpt of Lightning."
Source = Annotated[str, typer.Argument(metavar="SRC", help=_SOURCE_HELP)]
Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="What to write: a file for pth and gguf, else a folder.")
]
To = Annotated[
    Target,
    typer.Option(
        help="Format to write: official .pth, our safetensors folder, Hugging Face's libraries, the layout of the "
        "RWKV/ repositories there, llama.cpp."
    ),
]
From = Annotated[
    _Source | None,
    typer.Option("--from", help="What SRC must be; by default whatever its content says."),
]
Dtype = Annotated[
    StoredDtypeName | None,
    typer.Option(help="Round every weight to this (q8_0: gguf alone); by default each stays as it is."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST, once the new one is written and compared.")
]
Block0 = Annotated[
    Unused,
    typer.Option(
        help="RWKV-7's unused blocks.0.att.v0/v1/v2: as SRC has or lacks them, left out, or filled in (zeros)."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Read SRC, check all but values, say what would be written; write nothing."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")]


def convert_checkpoint(
    src: Source,
    dst: Destination,
    to: To,
    source_format: From = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    v7_block0: Block0 = Unused.KEEP,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write weights in another format, read them back and compare every bit."""
    from rwkv_train.checkpoints import convert

    written = convert(
        src,
        dst,
        to.value,
        source_format=None if source_format is None else source_format.value,
        dtype=stored_dtype(to, dtype),
        overwrite=overwrite,
        v7_block0=v7_block0.value,
        dry_run=dry_run,
    )
    report(written, as_json=as_json)


def stored_dtype(to: Target, name: StoredDtypeName | None) -> "StoredDtype | None":
    """Return what weights are rounded to.

    Raises:
        ConfigError: the format has no such dtype.
    """
    from rwkv_train.checkpoints.tensors import DTYPES

    if name is not StoredDtypeName.Q8_0:
        return None if name is None else DTYPES[name.value]
    if to is not Target.GGUF:
        raise ConfigError(f"--dtype q8_0 is for --to gguf, not {to.value}; choose fp32, bf16 or fp16")
    return "q8_0"


def report(written: "Conversion", *, as_json: bool) -> None:
    """Print what was written, or would be."""
    if as_json:
        import json

        typer.echo(json.dumps({**written._asdict(), "path": str(written.path)}, indent=2, ensure_ascii=False))
        return
    what = f"{written.path} ({written.to}, {written.n_tensors} tensors, {written.size_bytes:,} bytes)"
    typer.echo(f"wrote {what}, read back bit for bit" if written.is_written else f"would write {what}")
