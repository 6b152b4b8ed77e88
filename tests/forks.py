"""Processes that begin with PyTorch, Lightning and DeepSpeed loaded: copies of one that has loaded them for the CPU.

To load them takes a core ten seconds, which a test that starts several processes would spend for each. Not for tests
of a start itself, nor for runs that start processes of their own, as those begin with nothing.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

_CONTEXT = multiprocessing.get_context("forkserver")
# DeepSpeed's own optimizer, which it loads for every run, loads the compiler of PyTorch.
_CONTEXT.set_forkserver_preload(
    ["pytest", "rwkv_train.training.run", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


def start(line: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Start a script as Python does.

    Args:
        line: its path and its arguments.
        log: file for both of its streams.
        environment: variables besides those of this process.
    """
    surroundings = os.environ | dict(environment or {})
    process = _CONTEXT.Process(target=_run, args=([str(word) for word in line], str(log), surroundings))
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # read when DeepSpeed is imported
        process.start()
    return process


def start_ranks(lines: Sequence[Sequence[object]], logs: Sequence[Path]) -> list[BaseProcess]:
    """Start the ranks of a run as torchrun does, one for each line and log, with a thread each."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": len(lines),
        "LOCAL_WORLD_SIZE": len(lines),
        "GROUP_RANK": 0,
        "TORCHELASTIC_RUN_ID": "x",
    }
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    for rank, (line, log) in enumerate(zip(lines, logs, strict=True)):
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(line, log, {name: str(value) for name, value in variables.items()}))
    return processes


def end(processes: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for processes and kill those that are left; return the exit codes."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _run(line: list[str], log: str, environment: dict[str, str]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    if n_threads := environment.get("OMP_NUM_THREADS"):  # read when torch was loaded
        torch.set_num_threads(int(n_threads))
    sys.stdout.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = line
    sys.path.insert(0, str(Path(line[0]).parent))
    runpy.run_path(line[0], run_name="__main__")
