"""``rwkv-train convert-checkpoint``: weights from any format that is read to one that is written."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.inference import CHECKPOINT_HELP
from rwkv_train.errors import ConfigError

if TYPE_CHECKING:
    from rwkv_train.checkpoints.writing import StoredDtype


class _Target(StrEnum):
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


class _StoredDtype(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    Q8_0 = "q8_0"


class _Unused(StrEnum):
    KEEP = "keep"
    DROP = "drop"
    FILL = "fill"


_SOURCE_HELP = f"{CHECKPOINT_HELP} Also a checkpoint folder of DeepSpeed, or a .ckpt of Lightning."
Source = Annotated[str, typer.Argument(metavar="SRC", help=_SOURCE_HELP)]
Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="What to write: a file for pth and gguf, else a folder.")
]
To = Annotated[
    _Target,
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
    _StoredDtype | None,
    typer.Option(help="Round every weight to this (q8_0: gguf alone); by default each stays as it is."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST, once the new one is written and compared.")
]
Block0 = Annotated[
    _Unused,
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
    v7_block0: Block0 = _Unused.KEEP,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write weights in another format, read them back and compare every bit."""
    from rwkv_train.checkpoints import convert
    from rwkv_train.checkpoints.tensors import DTYPES

    if dtype is _StoredDtype.Q8_0 and to is not _Target.GGUF:
        raise ConfigError(f"--dtype q8_0 is for --to gguf, not {to.value}; choose fp32, bf16 or fp16")
    stored: StoredDtype | None = DTYPES[dtype.value] if dtype in DTYPES else None
    if dtype is _StoredDtype.Q8_0:
        stored = "q8_0"
    written = convert(
        src,
        dst,
        to.value,
        source_format=None if source_format is None else source_format.value,
        dtype=stored,
        overwrite=overwrite,
        v7_block0=v7_block0.value,
        dry_run=dry_run,
    )
    if as_json:
        import json

        typer.echo(json.dumps({**written._asdict(), "path": str(written.path)}, indent=2, ensure_ascii=False))
        return
    what = f"{written.path} ({to.value}, {written.n_tensors} tensors, {written.size_bytes:,} bytes)"
    typer.echo(f"wrote {what}, read back bit for bit" if written.is_written else f"would write {what}")
