"""``rwkv-train inspect``: what is in a checkpoint."""

from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.inference import CHECKPOINT_HELP

if TYPE_CHECKING:
    from rwkv_train.checkpoints import Description

CheckpointPath = Annotated[str, typer.Argument(metavar="PATH", help=CHECKPOINT_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def inspect(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: format, version, sizes, dtypes, tokenizer, training so far."""
    from rwkv_train.checkpoints import describe_checkpoint

    description = describe_checkpoint(path)
    if as_json:
        import json

        typer.echo(json.dumps(description._asdict(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in _rows(description):
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def _rows(description: "Description") -> list[tuple[str, str]]:
    """What there is, in the words and units of a person."""
    ranks = description.lora_ranks or {}
    tokenizer = description.tokenizer
    rows: list[tuple[str, str | None]] = [
        ("path", description.path),
        ("format", description.format),
        ("version", f"RWKV-{description.version}"),
        ("layers", _count(description.n_layer)),
        ("width", _count(description.n_embd)),
        ("heads", _count(description.n_head)),
        ("head size", _count(description.head_size)),
        ("LoRA ranks", ", ".join(f"{name} {rank}" for name, rank in ranks.items()) or None),
        ("FFN width", _count(description.ffn_width)),
        ("vocabulary", _count(description.vocab_size)),
        ("training ctx_len", _count(description.ctx_len)),
        ("parameters", _count(description.parameters)),
        ("dtype", ", ".join(description.dtypes)),
        ("tokenizer", f"{tokenizer['name']} (sha256 {tokenizer['sha256'][:16]})" if tokenizer else None),
        ("step", _count(description.step)),
        ("tokens", _count(description.tokens)),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"
