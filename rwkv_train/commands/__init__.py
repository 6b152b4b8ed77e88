"""The command line: one file a command, each parses, calls one library function and prints.

Results go to stdout, progress and warnings to stderr. Exit code 0: done; 2: the user can repair it, one line
says how; 75: a process of the run was lost, start it again; 128 + n: ended by signal n; 1: our mistake, with a
traceback.
"""

import errno
import os
import re
import signal
import sys
from typing import Annotated

import typer

from rwkv_train import __version__
from rwkv_train.commands.bench import bench
from rwkv_train.commands.build_kernels import build_kernels
from rwkv_train.commands.chat import chat
from rwkv_train.commands.checkpoints import checkpoints
from rwkv_train.commands.convert_checkpoint import convert_checkpoint
from rwkv_train.commands.doctor import doctor
from rwkv_train.commands.eval_harness import eval_harness
from rwkv_train.commands.eval_lambada import eval_lambada
from rwkv_train.commands.eval_ppl import eval_ppl
from rwkv_train.commands.finetune import finetune
from rwkv_train.commands.generate import generate
from rwkv_train.commands.init_weights import init_weights
from rwkv_train.commands.inspect import inspect
from rwkv_train.commands.merge_adapter import merge_adapter
from rwkv_train.commands.prepare_data import prepare_data
from rwkv_train.commands.pretrain import pretrain
from rwkv_train.commands.preview_data import preview_data
from rwkv_train.errors import RwkvTrainError

USER_CAN_REPAIR = 2
INTERRUPTED = 130
TERMINATED = 143
_DISK_PROBLEMS = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that is yours, or change its permissions",
    errno.EPERM: "choose a place that is yours, or change its permissions",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file, choose another one",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What the operating system refuses, and what a user can do about it."""

app = typer.Typer(
    name="rwkv-train",
    help="Pretrain, finetune, evaluate, convert and run RWKV language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    pretrain,
    finetune,
    prepare_data,
    preview_data,
    eval_ppl,
    eval_lambada,
    eval_harness,
    convert_checkpoint,
    merge_adapter,
    generate,
    chat,
    inspect,
    init_weights,
    bench,
    doctor,
    build_kernels,
)
for _command in _COMMANDS:
    app.command(name=_command.__name__.replace("_", "-"))(_command)
app.add_typer(checkpoints, name="checkpoints")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rwkv-train {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of ``sys.argv``; the entry point of ``rwkv-train``."""
    # GNU OpenMP's threads wait for each other by spinning, 300,000 rounds by default. Two training processes that
    # shared two cores so took 10 s a step, with 20,000 rounds 1.5 s (alone 0.4 s with either; sleeping at once
    # costs 40 % there). Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # torch's C++ parts print a stack trace when a process of the run is lost; we say which one it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Not at once: what is being written is cleared away, as after Ctrl-C. Training takes the signal over.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        app()
    except RwkvTrainError as error:
        if error.is_reported_elsewhere:
            sys.exit(error.exit_code)
        _leave(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in _DISK_PROBLEMS:
            raise
        if getattr(error, "is_reported_elsewhere", False):
            sys.exit(USER_CAN_REPAIR)
        place = error.filename or "a file could not be written or read"
        _leave(f"{place}: {error.strerror}; {_DISK_PROBLEMS[error.errno]}", USER_CAN_REPAIR)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        size = re.search(r"ried to (allocate [\d.]+ \w+)", str(error))
        asked = f" (it tried to {size[1]})" if size else ""
        _leave(
            f"out of memory{asked}; lower trainer.micro_batch_size or model.ctx_len, set trainer.grad_checkpointing or "
            "trainer.offload, or take more devices with strategy fsdp2 or deepspeed_3 (--dry-run estimates "
            "what a run needs); evaluation and generation: lower --batch-size and --chunk-len",
            USER_CAN_REPAIR,
        )
    except KeyboardInterrupt:
        if _rank():
            sys.exit(INTERRUPTED)
        _leave("interrupted", INTERRUPTED)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell without importing torch, which may not be there yet: its CPU allocator has no class of its own."""
    is_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_gpu or "can't allocate memory" in str(error)


def _rank() -> int:
    """Return the number of this process among those of a run."""
    from rwkv_train.parallel.world import rank_of

    return rank_of(os.environ)


def _leave(message: str, code: int) -> None:
    rank = _rank()
    # What only one of several processes has; what is the same for all, rank 0 says.
    who = f"rank {rank}: " if rank and not message.startswith("rank") else ""
    typer.echo(f"error: {who}{' '.join(message.split())}", err=True)
    sys.exit(code)
