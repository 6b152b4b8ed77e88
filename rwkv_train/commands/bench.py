"""``rwkv-train bench``: measure what takes time on this machine, from recurrences to the preparation of data."""

import importlib.util
import os
import tempfile
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv_train.commands.bench_kernels import (
    KernelDtype,
    Ops,
    Overwrite,
    Peers,
    PlotFile,
    Sizes,
    TableFile,
    Tune,
    kernel_failures,
    kernel_table,
    measure_kernels,
    require_picture,
    tune_kernels,
    tuning_target,
    write_roofline,
)
from rwkv_train.commands.inference import Device, find_device
from rwkv_train.commands.results import require_writable, write_json
from rwkv_train.commands.tables import print_table
from rwkv_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import torch
    from rich.table import Table


class What(StrEnum):
    """What is measured."""

    KERNELS = "kernels"
    HEAD = "head"
    TRAINING = "training"
    STRATEGIES = "strategies"
    SAVING = "saving"
    CONVERTING = "converting"
    EVALUATING = "evaluating"
    PREPARING = "preparing"


Subject = Annotated[
    What,
    typer.Argument(
        help="The recurrences alone; the loss of the head alone; training steps; steps under each strategy; "
        "checkpoints under each strategy; conversions of weights; eval-ppl beside lm-evaluation-harness with the same "
        "RWKV-4 in transformers; prepare-data beside its tokenizer alone."
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Of the recurrences, for kernels and training. May be repeated. By default for training torch and cpp on "
        "a CPU, cuda and cuda_exact on a GPU; for kernels all but reference. Kernels: the first is what the others' "
        "results are compared with.",
    ),
]
Strategies = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy", metavar="NAME", help="For strategies and saving. May be repeated. By default all."
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="For training: measure each backend with compiled blocks, too.")
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="For converting and evaluating: a preset or file whose sizes are taken. By default rwkv7-0.4b and "
        "rwkv4-169m.",
    ),
]
Input = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="For preparing: text, as prepare-data takes it. By default the built-in corpus."
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements after a warm-up; the median counts.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the measurements to this file.")
]

WORLD_ROWS = 65_536
"""Rows of the embedding of every published model with the World vocabulary."""
EVALUATED_TEXTS = 8
EVALUATED_CHARACTERS = 1500
"""Of each: below the 1,024 tokens of RWKV-4's context, so that nobody cuts it into windows."""

_SUBJECTS = {
    "--backend": (What.KERNELS, What.TRAINING),
    "--compile": (What.TRAINING,),
    "--strategy": (What.STRATEGIES, What.SAVING),
    "--config": (What.CONVERTING, What.EVALUATING),
    "--input": (What.PREPARING,),
    "--op": (What.KERNELS,),
    "--size": (What.KERNELS,),
    "--peer": (What.KERNELS,),
    "--dtype": (What.KERNELS,),
    "--plot": (What.KERNELS,),
    "--tune": (What.KERNELS,),
}
"""What an option is for, if not for all."""
_ONLY_WITH_TUNE = ("--output", "--overwrite")
_NOT_WITH_TUNE = ("--backend", "--size", "--peer", "--json", "--plot")
_SAME_IN_EVERY_ROW = frozenset({"device", "dtype", "repeats"})
"""Written to the file, but not worth a column on a terminal."""


def bench(
    what: Subject,
    backend: Backends = None,
    compile: Compile = False,  # noqa: A002 - the option's name
    strategy: Strategies = None,
    config: Config = None,
    input: Input = None,  # noqa: A002 - the option's name
    op: Ops = None,
    size: Sizes = None,
    peer: Peers = None,
    dtype: KernelDtype = None,
    repeats: Repeats = 5,
    device: Device = "auto",
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    tune: Tune = False,
    output: TableFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure backends in turn within one process, or strategies each in processes of its own."""
    from rwkv_train.benchmarks.environment import describe_environment

    given = {
        "--backend": backend,
        "--compile": compile,
        "--strategy": strategy,
        "--config": config,
        "--input": input,
        "--op": op,
        "--size": size,
        "--peer": peer,
        "--dtype": dtype,
        "--json": json_file,
        "--plot": plot_file,
        "--tune": tune,
        "--output": output,
        "--overwrite": overwrite,
    }
    _require_fitting([option for option, value in given.items() if value], what)
    require_picture(plot_file)
    _prepare_target(json_file, "--json")
    _prepare_target(plot_file, "--plot")
    place = find_device(device)
    environment = describe_environment(place) | {"load_before": round(os.getloadavg()[0], 2)}
    title = what.value
    if tune:
        table, measured_before = tuning_target(output, place, overwrite=overwrite)
        _prepare_target(table, "--output")
        print_table(
            _table(title, tune_kernels(op, dtype, repeats, place, table, measured_before, environment))
        )
        typer.echo(f"wrote {table}")
        return
    if what is What.KERNELS:
        measured = measure_kernels(backend, op, size, peer, dtype, repeats, place)
        title, rows = kernel_table(measured)
    elif what in (What.STRATEGIES, What.SAVING):
        rows = _measure_runs(what, _strategies(strategy), repeats, place)
    elif what is What.CONVERTING:
        from rwkv_train.benchmarks.converting import bench_converting
        from rwkv_train.config.load import load_train_config

        model = load_train_config(config or "rwkv7-0.4b", []).model
        rows = list(bench_converting(model, repeats=repeats))
    elif what is What.EVALUATING:
        rows = _measure_evaluating(config or "rwkv4-169m", repeats, place)
    elif what is What.HEAD:
        rows = _measure_head(repeats, place)
    elif what is What.PREPARING:
        rows = _measure_preparing(input, repeats)
    else:
        rows = _measure_training(backend, repeats, place, compiles=compile)
    print_table(_table(title, rows))
    if what is What.KERNELS:
        for line in kernel_failures(measured):
            typer.echo(line)
    content = {"environment": environment} | (measured if what is What.KERNELS else {"results": rows})
    if json_file is not None:
        write_json(json_file, content)
        typer.echo(f"wrote {json_file}")
    if plot_file is not None:
        write_roofline(plot_file, content, environment["device"])
        typer.echo(f"wrote {plot_file}")


def _require_fitting(options: "Collection[str]", what: What) -> None:
    """Refuse options that are not for what is measured.

    Raises:
        ConfigError: there is one.
    """
    for option in options:
        subjects = _SUBJECTS.get(option, tuple(What))
        if what not in subjects:
            raise ConfigError(f"{option} is for {' and '.join(subjects)}, not for {what.value}")
        if option in _ONLY_WITH_TUNE and "--tune" not in options:
            raise ConfigError(f"{option} is for --tune")
        if option in _NOT_WITH_TUNE and "--tune" in options:
            raise ConfigError(
                f"{option} is not for --tune, which measures a grid of its own and writes --output"
            )


def _strategies(asked: list[str] | None) -> list[str]:
    from rwkv_train.benchmarks.strategies import ALL

    for name in asked or ():
        if name not in ALL:
            raise ConfigError(f"--strategy {name}: there is no such strategy; choose one of {', '.join(ALL)}")
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if asked is None and not has_deepspeed:
        typer.echo("DeepSpeed is not installed; its strategies are left out", err=True)
    return asked or [name for name in ALL if has_deepspeed or not name.startswith("deepspeed")]


def _measure_runs(
    what: What, strategies: list[str], repeats: int, device: "torch.device"
) -> list[dict[str, Any]]:
    import torch

    if device.type == "cuda":
        n_devices, accelerator = min(2, torch.cuda.device_count()), "gpu"
    else:
        n_devices, accelerator = 2, "cpu"
    if what is What.SAVING:
        from rwkv_train.benchmarks.saving import bench_saving

        rows = bench_saving(
            strategies=strategies, n_processes=n_devices, accelerator=accelerator, repeats=repeats
        )
    else:
        from rwkv_train.benchmarks.strategies import (
            CREWS,
            STANDARD_CPU,
            STANDARD_GPU,
            bench_strategies,
        )

        rows = bench_strategies(
            STANDARD_GPU if accelerator == "gpu" else STANDARD_CPU,
            strategies=strategies,
            crews=[crew for crew in CREWS[accelerator] if crew.n_processes <= n_devices],
            accelerator=accelerator,
            repeats=repeats,
        )
    return _shown(rows)


def _measure_preparing(source: Path | None, repeats: int) -> list[dict[str, Any]]:
    from rwkv_train.benchmarks.preparing import bench_preparing
    from rwkv_train.config.data import DataConfig
    from rwkv_train.data.builtin import builtin_folder, write_builtin_corpus

    if source is None:
        source = write_builtin_corpus(builtin_folder(Path(DataConfig().cache_dir)))["train"]
    return list(bench_preparing(source, repeats=repeats))


def _measure_evaluating(config: str, repeats: int, device: "torch.device") -> list[dict[str, Any]]:
    from rwkv_train.benchmarks.evaluating import bench_evaluating
    from rwkv_train.config.data import DataConfig
    from rwkv_train.config.load import load_train_config
    from rwkv_train.data.builtin import builtin_folder, write_builtin_corpus
    from rwkv_train.data.corpus import read_documents
    from rwkv_train.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("world")  # the one that transformers can be given without the network
    model = load_train_config(config, []).model.model_copy(update={"vocab_size": WORLD_ROWS})
    path = write_builtin_corpus(builtin_folder(Path(DataConfig().cache_dir)))["valid"]
    texts = [
        document.text[:EVALUATED_CHARACTERS] for document in islice(read_documents([path]), EVALUATED_TEXTS)
    ]
    return list(bench_evaluating(model, tokenizer, texts, repeats=repeats, device=device))


def _shown(rows: "Iterator[dict[str, Any]]") -> list[dict[str, Any]]:
    """Collect rows that take a while each, and say that they come."""
    found = []
    for row in rows:
        typer.echo(f"{row['strategy']}, {row['processes']} processes: done", err=True)
        found.append(row)
    return found


def _measure_head(repeats: int, device: "torch.device") -> list[dict[str, Any]]:
    import torch

    from rwkv_train.benchmarks.head import STANDARD_CPU, STANDARD_GPU, bench_head

    sizes, dtype = (STANDARD_GPU, torch.bfloat16) if device.type == "cuda" else (STANDARD_CPU, torch.float32)
    return [row for size in sizes for row in bench_head(size, device=device, dtype=dtype, repeats=repeats)]


def _measure_training(
    backends: list[str] | None, repeats: int, device: "torch.device", *, compiles: bool
) -> list[dict[str, Any]]:
    import torch

    from rwkv_train.benchmarks.training import STANDARD_CPU, STANDARD_GPU, bench_training, default_backends

    cases, dtype = (STANDARD_GPU, torch.bfloat16) if device.type == "cuda" else (STANDARD_CPU, torch.float32)
    rows = []
    for case in cases:
        names = backends or default_backends(case, device)
        rows += bench_training(
            case, backends=names, device=device, dtype=dtype, compiles=compiles, repeats=repeats
        )
        typer.echo(f"{case.config.arch} L{case.config.n_layer} C{case.config.n_embd}: done", err=True)
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = [name for name in rows[0] if name not in _SAME_IN_EVERY_ROW]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        is_number = any(isinstance(row[name], int | float) for row in rows)
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*map(_cell, (row[name] for name in shown)))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def _prepare_target(path: Path | None, option: str) -> None:
    """Make the folder of a result before the long work, and find out whether a file can be made in it.

    Raises:
        ConfigError: the file cannot be written.
    """
    from rwkv_train.checkpoints.io import resolve_target

    if path is None:
        return
    if path.exists() and not path.is_file():  # a device such as /dev/stdout, which is written to; or a folder
        require_writable(path, option)
        return
    target = resolve_target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        require_writable(target, option)
        # To root every folder looks writable, also where no file can be made, as in /proc.
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written: {error.strerror}; give a file in a folder that can be"
        ) from error
