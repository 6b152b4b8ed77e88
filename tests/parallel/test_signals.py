"""Stopping: noted, acted on by the run, and enforced; in processes of their own where they end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rwkv_train.parallel.signals import STOPPING, StopSignal

SCRIPT = """
import logging, os, sys, time
from rwkv_train.parallel.signals import StopSignal
logging.basicConfig(level=logging.INFO, format="%(message)s")
stop = StopSignal(grace_seconds={grace})
stop.listen()
print("ready", flush=True)
{body}
"""
PATIENCE_SECONDS = 60
# A lock of C taken twice: as in a collective, Python's own handlers do not run while it waits.
STUCK = (
    "import ctypes; lock = ctypes.create_string_buffer(64); lib = ctypes.CDLL(None)\n"
    "lib.pthread_mutex_lock(lock); lib.pthread_mutex_lock(lock)"
)
SAVING = "\nwhile not stop.is_set: time.sleep(0.01)\ntime.sleep(60)"
STOPS = (
    "\nwhile not stop.is_set: time.sleep(0.01)\nstop.ignore()\ntime.sleep(0.5)\nsys.exit(128 + stop.received)"
)


@pytest.fixture
def start():
    started = []

    def run(body, grace):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(body=body, grace=grace)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    _, log = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, log


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_is_noted_and_the_run_ends_in_its_own_time(start, number):
    process = start(STOPS, grace=0.2)  # shorter than the end of the script, after it let go
    process.send_signal(number)
    code, log = end(process)
    assert code == 128 + number
    assert f"{number.name}: saving after this step, within 0.2 s" in log
    assert "did not end" not in log


def test_a_second_ctrl_c_ends_at_once(start):
    process = start(SAVING, grace=100)
    process.send_signal(signal.SIGINT)
    assert "once more stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130


@pytest.mark.parametrize("body", [SAVING, STUCK], ids=["a slow save", "a collective that never ends"])
def test_the_grace_time_is_enforced(start, body):
    process = start(body, grace=0.5)
    process.send_signal(signal.SIGUSR1)
    code, log = end(process)
    assert code == 128 + signal.SIGUSR1
    assert "did not end within 0.5 s (trainer.grace_seconds) of SIGUSR1" in log


def test_a_request_that_comes_twice_is_one_request(start):
    process = start(STOPS, grace=100)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


def test_what_was_there_before_comes_back():
    before = [signal.getsignal(number) for number in STOPPING]
    stop = StopSignal(60)
    stop.listen()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as another library does
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not stop.is_set and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.ignore()

    assert stop.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1
