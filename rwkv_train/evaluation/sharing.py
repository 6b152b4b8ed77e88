"""Several processes that share the documents of an evaluation, each with a model of its own on a device of its own."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import cast

import torch

from rwkv_train.errors import LostProcessError, RwkvTrainError
from rwkv_train.evaluation.job import Evaluation, Job, run_job
from rwkv_train.evaluation.perplexity import require_scored
from rwkv_train.evaluation.totals import Totals


def evaluate_checkpoint(
    job: Job, devices: list[torch.device], *, on_document: Callable[[Totals], None] | None = None
) -> Evaluation:
    """Evaluate a checkpoint with a process for each device; one device needs no other process than this.

    The result is that of one process, but for the order in which numbers are added up.

    Args:
        job: what is to be done.
        devices: one for each process; those of the CPU share its cores.
        on_document: called with the totals of each document when it is done.

    Raises:
        RwkvTrainError: a setting, the checkpoint or the data are not what they should be; there is nothing to score.
        LostProcessError: a process ended without a result.
    """
    job.require_consistent(len(devices))
    if len(devices) == 1:
        evaluation = run_job(job, devices[0], on_document=on_document)
    else:
        evaluation = _evaluate_together(job, devices, on_document or (lambda totals: None))
    require_scored(evaluation.report)
    return evaluation


def _evaluate_together(
    job: Job, devices: list[torch.device], on_document: Callable[[Totals], None]
) -> Evaluation:
    # Not forked: a process that has used CUDA or threads cannot go on after a fork.
    context = multiprocessing.get_context("spawn")
    processes, channels = [], []
    try:
        for rank, device in enumerate(devices):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_share, args=(job, device, rank, len(devices), theirs), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            channels.append(ours)
        results: dict[int, Evaluation] = {}
        while len(results) < len(devices):
            running = [channel for rank, channel in enumerate(channels) if rank not in results]
            for channel in cast("list[Connection]", wait(running)):
                rank = channels.index(channel)
                try:
                    message = channel.recv()
                except EOFError as error:
                    processes[rank].join()
                    raise LostProcessError(
                        f"process {rank} of the evaluation ended with exit code {processes[rank].exitcode} and no "
                        "result; a negative code is the number of the signal that ended it"
                    ) from error
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Evaluation):
                    results[rank] = message
                else:
                    on_document(message)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    first = results[0]
    for rank in range(1, len(devices)):
        first.report.merge(results[rank].report)
    return first


def _run_share(job: Job, device: torch.device, rank: int, world_size: int, channel: Connection) -> None:
    """Do the share of one process and send totals, then the result or the error that the user can repair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends this one
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    else:
        torch.cuda.set_device(device)
    try:
        evaluation = run_job(job, device, rank=rank, world_size=world_size, on_document=channel.send)
    except (RwkvTrainError, OSError, MemoryError, RuntimeError) as error:
        error.add_note(traceback.format_exc())  # shown only where the error is our mistake
        channel.send(error)
    else:
        channel.send(evaluation)
