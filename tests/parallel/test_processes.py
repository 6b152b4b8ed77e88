"""Processes of their own that meet, agree, disagree, fail and vanish; scripts without any training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import forks

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import DataError, RwkvTrainError
from rwkv_train.parallel.processes import join_processes, naming_lost_processes

folder = Path({folder!r})
n = int(os.environ.get("ASKED", os.environ["WORLD_SIZE"]))
settings = TrainerConfig(out_dir="x", max_steps=1, devices=n, global_batch_size=n, micro_batch_size=1,
                         hang_timeout_seconds=60)

def attempt(action):
    try:
        action()
    except (RwkvTrainError, OSError) as error:
        return [type(error).__name__, str(error), getattr(error, "is_reported_elsewhere", None)]

def leave(error):
    if not error.is_reported_elsewhere:
        os.write(2, ("error: " + str(error) + chr(10)).encode())
    sys.exit(error.exit_code)

try:
    with join_processes(settings, backend="gloo", connect_seconds={connect}) as processes:
        rank = processes.rank
{body}
except RwkvTrainError as error:
    leave(error)
"""
PATIENCE_SECONDS = 120


def indented(body):
    return "".join(f"        {line}\n" for line in body.splitlines())


@pytest.fixture
def write(tmp_path):
    """Write a script of what happens inside; return its path."""

    def make(body, connect=20.0):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(folder=str(tmp_path), body=indented(body), connect=connect))
        return path

    return make


def start_rank(path, rank, n_ranks, port, **environment):
    """Start one process by rank; return it with its log."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    log = path.with_name(f"log-{rank}.txt")
    return forks.start([path], log, variables | environment), log


@pytest.fixture
def start():
    """Start one process by rank; all are ended with the test."""
    started = []

    def run(*arguments, **environment):
        started.append(start_rank(*arguments, **environment))
        return started[-1]

    yield run
    for process, _ in started:
        process.kill()


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def ends(processes):
    for process, _ in processes:
        process.join(PATIENCE_SECONDS)
    return [process.exitcode for process, _ in processes], [log.read_text() for _, log in processes]


AGREEMENT = """
results = {}
results["any"] = processes.any_of(rank == 1, False)
results["gather"] = processes.gather({"rank": rank})
results["broadcast"] = processes.broadcast(f"of {rank}")

def one_fails():
    with processes.failing_together():
        if rank == 1:
            raise DataError("no file")

def all_fail():
    with processes.failing_together():
        raise DataError("no corpus")

def all_fail_apart():
    with processes.failing_together():
        raise DataError(f"no shard {rank}")

def the_disk_is_full():
    with processes.failing_together():
        if rank == 2:
            raise OSError(28, "No space left on device", "/there")

results["one"] = attempt(one_fails)
results["all"] = attempt(all_fail)
results["apart"] = attempt(all_fail_apart)
results["disk"] = attempt(the_disk_is_full)
results["same"] = attempt(lambda: processes.require_same({"optim": {"lr": 0.1, "betas": [0.9, 0.95]}}))
results["differ"] = attempt(lambda: processes.require_same({"seed": 1, "optim": {"lr": 0.1 if rank < 2 else 0.2}}))
results["missing"] = attempt(lambda: processes.require_same({"seed": 1} | ({"extra": 2} if rank == 1 else {})))
(folder / f"{rank}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("agreement")
    path = folder / "script.py"
    path.write_text(SCRIPT.format(folder=str(folder), body=indented(AGREEMENT), connect=20.0))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    codes, logs = ends([start_rank(path, rank, 3, port) for rank in range(3)])
    assert codes == [0, 0, 0], logs
    assert logs == ["", "", ""]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("any", [True, False]),
        ("gather", [{"rank": 0}, {"rank": 1}, {"rank": 2}]),
        ("broadcast", "of 0"),
        ("same", None),
    ],
    ids=["any_of", "gather", "broadcast", "require_same"],
)
def test_all_processes_get_the_same_answer(results, name, expected):
    assert [one[name] for one in results] == [expected] * 3


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("one", "DataError", "rank 1: no file"),
        ("all", "DataError", "no corpus"),
        ("apart", "DataError", "rank 0: no shard 0; rank 1: no shard 1; rank 2: no shard 2"),
        ("disk", "OSError", "[Errno 28] No space left on device: 'rank 2: /there'"),
        (
            "differ",
            "ConfigError",
            "optim.lr is 0.2 on rank 2 but 0.1 on rank 0; start all processes with the same settings, code and data",
        ),
        (
            "missing",
            "ConfigError",
            "extra is 2 on rank 1 but nothing on rank 0; start all processes with the same settings, code and data",
        ),
    ],
)
def test_an_error_of_one_is_raised_on_all_and_printed_by_the_first(results, name, kind, sentence):
    assert [one[name] for one in results] == [
        [kind, sentence, False],
        [kind, sentence, True],
        [kind, sentence, True],
    ]


def test_a_world_of_another_size_is_refused_by_all_and_said_once(write, start, port):
    path = write("pass")
    codes, logs = ends([start(path, rank, 2, port, ASKED="3") for rank in range(2)])
    assert codes == [2, 2]
    assert "trainer.devices (3) x trainer.num_nodes (1) is 3 processes but the launcher started 2" in logs[0]
    assert logs[1] == ""


def test_settings_that_only_one_process_has_are_refused_by_all(write, start, port):
    path = write("pass")
    codes, logs = ends([start(path, rank, 2, port, ASKED=str(2 + rank)) for rank in range(2)])
    assert codes == [2, 2]
    assert "rank 1: trainer.devices (3)" in logs[0]


def test_a_process_that_does_not_come_is_named(write, start, port):
    codes, logs = ends([start(write("pass", connect=1.0), 0, 2, port)])
    assert codes == [2]
    assert f"rank 1 did not come to 127.0.0.1:{port} within 1 s" in logs[0]


def test_a_port_in_use_is_refused_by_all(write, start):
    path = write("pass", connect=2.0)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        codes, logs = ends([start(path, rank, 2, port) for rank in range(2)])
    assert codes == [2, 2]
    assert f"MASTER_PORT ({port}) is in use by another program" in logs[0]
    assert f"rank 1 cannot reach rank 0 at 127.0.0.1:{port}" in logs[1]


def test_the_others_name_the_first_process_when_it_is_killed(write, start, port):
    path = write(
        "processes.any_of(False)  # all have come\n"
        "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with naming_lost_processes(processes): dist.all_reduce(torch.ones(3))"
    )
    codes, logs = ends([start(path, rank, 2, port) for rank in range(2)])
    assert codes == [-signal.SIGKILL, 75]
    assert (
        logs[1]
        == "error: rank 0 is gone or does not answer; the same command goes on from the last checkpoint\n"
    )


def test_a_mistake_on_one_process_keeps_its_traceback_and_the_others_name_it(write, start, port):
    path = write("if rank == 1: raise TypeError('shapes')\nprocesses.any_of(True)")
    codes, logs = ends([start(path, rank, 2, port) for rank in range(2)])
    assert codes == [75, 1]
    assert "rank 1 left the run: TypeError: shapes" in logs[0]
    assert "Traceback" in logs[1]


def test_of_three_the_two_left_say_the_same_and_say_it_once(write, start, port):
    path = write(
        "processes.any_of(False)  # all have come\n"
        "if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "processes.any_of(True)\n"
        "time.sleep(60)"
    )
    codes, logs = ends([start(path, rank, 3, port) for rank in range(3)])
    assert codes == [75, 75, -signal.SIGKILL]
    assert "".join(logs).count("rank 2 is gone") == 1


def test_processes_end_when_their_launcher_is_killed(tmp_path, write):
    path = write("(folder / f'{rank}.pid').write_text(str(os.getpid()))\ntime.sleep(60)")
    parent = (
        "import sys\n"
        "from rwkv_train.config.trainer import TrainerConfig\n"
        "from rwkv_train.parallel.launch import launch\n"
        "settings = TrainerConfig(out_dir='x', max_steps=1, devices=2, global_batch_size=2, micro_batch_size=1)\n"
        f"launch(settings, [sys.executable, {str(path)!r}])"
    )
    launcher = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    try:
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        assert _until(lambda: all(file.exists() and file.read_text() for file in files))
    finally:
        launcher.kill()
        launcher.wait()
    assert _until(lambda: not any(_is_running(int(file.read_text())) for file in files))


def test_torchrun_starts_the_processes_again(tmp_path, write):
    path = write(
        "attempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "if rank == 1 and attempt == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "processes.any_of(True)\n"
        "(folder / f'done-{rank}-{attempt}').touch()"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, "--max-restarts=1", "--monitor-interval=0.1", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in tmp_path.glob("done-*")) == ["done-0-1", "done-1-1"]


def _until(is_so):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


def _is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent (this container's first process) has not asked for it is gone as well.
    with open(f"/proc/{process_id}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0] != "Z"
