"""The launcher, with children that are small scripts: what they get, and what becomes of how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

PARENT = """
import logging, sys
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import RwkvTrainError
from rwkv_train.parallel.launch import launch
logging.basicConfig(level=logging.INFO)
settings = TrainerConfig(out_dir="x", max_steps=1, devices=2, global_batch_size=2, micro_batch_size=1,
                         grace_seconds=1, hang_timeout_seconds=1)
try:
    code = launch(settings, [sys.executable, "-c", {child!r}], patience_seconds={patience}, last_seconds=0.5)
except RwkvTrainError as error:
    print("error:", error, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
folder = Path({folder!r})
"""
READY = "(folder / f'ready-{rank}').touch()\n"
PATIENCE_SECONDS = 60


@pytest.fixture
def start(tmp_path):
    """Start a launcher of two children that run a script; the launcher is ended with the test."""
    started = []

    def run(script, patience=1.0, **environment):
        child = CHILD.format(folder=str(tmp_path)) + script
        names = {
            name: value
            for name, value in os.environ.items()
            if name not in ("OMP_NUM_THREADS", "MASTER_PORT")
        }
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(child=child, patience=patience)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=names | environment,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    out, log = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, log


def wait_for_both(folder):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


def test_children_get_the_variables_of_torchrun_and_their_share_of_the_cores(start, tmp_path):
    code, _, log = end(start("(folder / f'{rank}.json').write_text(json.dumps(dict(os.environ)))"))

    assert code == 0, log
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [one["RANK"], other["RANK"]] == [one["LOCAL_RANK"], other["LOCAL_RANK"]] == ["0", "1"]
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}.items():
        assert one[name] == other[name] == value
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        assert one[name] == other[name] != ""
    n_threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert one["OMP_NUM_THREADS"] == str(n_threads)
    assert log.count(f"OMP_NUM_THREADS={n_threads} each") == 1


def test_what_the_user_set_stays(start, tmp_path):
    script = "(folder / f'{rank}.json').write_text(os.environ['OMP_NUM_THREADS'])"
    assert end(start(script, OMP_NUM_THREADS="7"))[0] == 0
    assert (tmp_path / "1.json").read_text() == "7"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("print(rank)", 0),
        ("sys.exit(2)", 2),
        ("sys.exit(75)", 75),
        ("sys.exit(1 if rank else 75)", 1),
        ("sys.exit(2 if rank else 0)", 2),
    ],
    ids=["done", "refused", "lost", "our mistake, and who noticed it", "one of them"],
)
def test_the_exit_code_is_that_of_the_children(start, script, expected):
    assert end(start(script))[0] == expected


def test_a_killed_child_is_named_and_the_others_are_ended(start, tmp_path):
    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN) if rank == 0 else None\n"
        "(folder / f'{rank}.pid').write_text(str(os.getpid()))\n"
        "os.kill(os.getpid(), signal.SIGSEGV) if rank else time.sleep(60)"
    )
    process = start("import rwkv_train\n" + script, patience=0.2)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "1.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    code, _, log = end(process)

    assert code == 75
    pid = (tmp_path / "1.pid").read_text()
    assert f"rank 1 (process {pid}) was killed by SIGSEGV" in log
    assert "the same command goes on from the last checkpoint" in log
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0.pid").read_text()), 0)


def test_a_child_that_stays_when_the_others_are_done_is_ended_and_named(start):
    code, _, log = end(start("time.sleep(60 * rank)", patience=0.2))
    assert code == 75
    assert "rank 1" in log
    assert "did not end though the others had" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_comes_to_each_child_once(start, tmp_path, number):
    script = (
        "got = []\n"
        f"signal.signal({int(number)}, lambda number, frame: got.append(number))\n"
        f"{READY}"
        "while not got: time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        f"(folder / f'got-{{rank}}').write_text(str(len(got)))\n"
        f"sys.exit({128 + number})"
    )
    process = start(script)
    wait_for_both(tmp_path)
    process.send_signal(number)
    if number != signal.SIGINT:
        process.send_signal(number)  # it may come from two sides
    code, _, log = end(process)

    assert code == 128 + number, log
    assert [(tmp_path / f"got-{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_second_ctrl_c_ends_children_at_once_that_take_their_time(start, tmp_path):
    script = f"signal.signal(signal.SIGINT, lambda *a: os.write(1, b'noted\\n'))\n{READY}time.sleep(60)"
    process = start(script, patience=100.0)
    wait_for_both(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130


def test_children_that_do_not_end_within_the_grace_time_are_ended(start, tmp_path):
    process = start(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}time.sleep(60)", patience=0.1)
    wait_for_both(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


def test_a_port_in_use_is_refused_by_number(start):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, _, log = end(start("", MASTER_PORT=str(port)))
    assert code == 2
    assert f"MASTER_PORT ({port}) is in use by another program" in log


def test_a_port_that_is_no_number_is_refused(start):
    code, _, log = end(start("", MASTER_PORT="auto"))
    assert code == 2
    assert "MASTER_PORT is 'auto'" in log
