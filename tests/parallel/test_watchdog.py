"""Runs that hang: who is named, and that all end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rwkv_train.parallel.processes import Processes
from rwkv_train.parallel.watchdog import Watchdog
from tests import forks

SCRIPT = """
import logging, os, signal, sys, time
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import RwkvTrainError
from rwkv_train.parallel.launch import launch, needs_launch

logging.basicConfig(level=logging.INFO)
settings = TrainerConfig(out_dir="x", max_steps=1, devices=2, global_batch_size=2, micro_batch_size=1,
                         hang_timeout_seconds=2)

def main():
    if needs_launch(settings):
        sys.exit(launch(settings, sys.orig_argv, patience_seconds=3, last_seconds=0.5))
    import torch
    import torch.distributed as dist
    from rwkv_train.parallel.processes import join_processes, naming_lost_processes
    from rwkv_train.parallel.watchdog import Watchdog

    with join_processes(settings, backend="gloo") as processes:
        watchdog = Watchdog(processes, settings.hang_timeout_seconds)
        watchdog.start()
        for step in range(10):
            watchdog.beat()
            if step == 5:
                {problem}
            with naming_lost_processes(processes):
                dist.all_reduce(torch.ones(3))
        watchdog.stop()
        {after}

def fall_asleep():
    time.sleep(60)

try:
    main()
except RwkvTrainError as error:
    if not error.is_reported_elsewhere:
        print("error:", error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
PATIENCE_SECONDS = 60


@pytest.fixture
def write(tmp_path):
    """Write the loop with a problem at step 5; return its path."""

    def make(problem="pass", after="pass"):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(problem=problem, after=after))
        return path

    return make


@pytest.fixture
def run(write, tmp_path):
    """Run the loop in two processes until the first one ends; return their exit codes and what they said."""

    def make(problem="pass", after="pass"):
        logs = [tmp_path / f"{rank}.txt" for rank in range(2)]
        ranks = forks.start_ranks([[write(problem, after)]] * 2, logs)
        codes = forks.end(ranks[:1], PATIENCE_SECONDS) + forks.end(ranks[1:], 10)
        return codes, "".join(log.read_text() for log in logs)

    return make


def errors_of(log):
    return [line for line in log.splitlines() if line.startswith("error:")]


def names_the_stopped(rank):
    return [
        f"error: no progress for 2 s (trainer.hang_timeout_seconds): rank {rank} does not answer; the same command "
        "goes on from the last checkpoint"
    ]


def test_the_host_of_the_store_is_named_when_it_is_stopped_and_all_end(write):
    path = write("if processes.rank == 0: os.kill(os.getpid(), signal.SIGSTOP)")
    names = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_PORT")}
    result = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        env=names,
    )
    assert result.returncode == 75
    assert errors_of(result.stderr) == names_the_stopped(0)


def test_another_process_is_named_when_it_is_stopped(run):
    codes, log = run("if processes.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)")
    assert codes == [75, -signal.SIGKILL]  # the second one by us: its launcher would
    assert errors_of(log) == names_the_stopped(1)


def test_a_process_that_sleeps_while_the_others_wait_for_it_is_named_with_its_line(run):
    codes, log = run("if processes.rank == 1: fall_asleep()")
    assert codes == [75, 75]
    (error,) = errors_of(log)
    assert "rank 1 is behind the others, at " in error
    assert "in fall_asleep;" in error


def test_fewer_beats_tell_who_is_behind(run):
    # Both wait for a lock, so that only the count differs.
    codes, log = run(
        "import threading; watchdog.beat() if processes.rank == 0 else None; threading.Event().wait(60)"
    )
    assert codes == [75, 75]
    (error,) = errors_of(log)
    assert "rank 1 is behind the others" in error


def test_a_run_that_goes_on_or_is_watched_no_more_is_left_alone(run):
    codes, log = run("time.sleep(1)", after="time.sleep(3)")
    assert codes == [0, 0], log
    assert errors_of(log) == []


def test_alone_a_slow_step_does_not_end_a_run():
    watchdog = Watchdog(Processes(), 0.01)
    watchdog.start()
    watchdog.beat()
    time.sleep(0.5)
    watchdog.stop()
