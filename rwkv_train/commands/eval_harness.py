"""``rwkv-train eval-harness``: any task of EleutherAI's lm-evaluation-harness."""

import importlib.util
from pathlib import Path
from typing import Annotated

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
from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.prefix import Prefix

Tasks = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="Tasks, groups, patterns such as 'pile_*', or YAML files; `lm_eval ls tasks` lists them.",
    ),
]
IncludePath = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the YAML files of more tasks are.")
]
NumFewshot = Annotated[
    int | None, typer.Option(min=0, help="Examples before each question; by default as each task says.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only this many documents of each task, for a look.")]
PrefixName = Annotated[
    Prefix,
    typer.Option(
        "--prefix",
        help="What the model reads before each request. end-of-document: its token 0; newline: a line feed, as "
        "ChatRWKV's adapter; none: nothing, as the harness with transformers' models by default.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Requests that are read side by side.")]
ChunkLen = Annotated[int, typer.Option(help="Tokens of each that are read at once; no limit to the context.")]


def eval_harness(
    checkpoint: Checkpoint,
    tasks: Tasks,
    include_path: IncludePath = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    prefix: PrefixName = Prefix.END_OF_DOCUMENT,
    tokenizer: TokenizerName = None,
    json_file: JsonFile = None,
    batch_size: BatchSize = 8,
    chunk_len: ChunkLen = 256,
    device: Device = "auto",
    dtype: Dtype = DtypeName.FP32,
) -> None:
    """Run tasks of lm-evaluation-harness and print its table."""
    names = [name for name in map(str.strip, tasks.split(",")) if name]
    if not names:
        raise ConfigError("--tasks names no task; give names with commas between them")
    require_writable(json_file)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("eval-harness needs lm-evaluation-harness: pip install 'rwkv-train[lm-eval]'")

    from rwkv_train.evaluation.harness import RwkvTrainLM
    from rwkv_train.evaluation.harness_tasks import evaluate_tasks, format_results

    model, text_tokenizer = load_for_inference(checkpoint, tokenizer, device, dtype)
    results = evaluate_tasks(
        RwkvTrainLM(model, text_tokenizer, prefix=prefix, batch_size=batch_size, chunk_len=chunk_len),
        names,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
    )
    typer.echo(format_results(results))
    write_json(json_file, results | {"checkpoint": checkpoint})
