"""Several processes at the command line: one message, one exit code, whoever started them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_train import commands
from rwkv_train.errors import ConfigError, LostProcessError
from tests import forks

CHECKOUT = Path(__file__).parents[2]
TWO = [
    "pretrain",
    "--config",
    "quickstart",
    "--set",
    "trainer.devices=2",
    "--set",
    "trainer.micro_batch_size=4",
]


@pytest.fixture
def leave_with(monkeypatch, capsys):
    """Run ``main`` with a command line that raises; return the exit code and what is on stderr."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)

    def run(error, **environment):
        def app():
            raise error

        monkeypatch.setattr(commands, "app", app)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as caught:
            commands.main()
        return caught.value.code, capsys.readouterr().err

    return run


def test_a_lost_process_leaves_with_the_code_that_asks_for_another_try(leave_with):
    assert leave_with(LostProcessError("rank 1 is gone")) == (75, "error: rank 1 is gone\n")


@pytest.mark.parametrize("error", [ConfigError("x"), OSError(28, "full", "/x")], ids=["ours", "the disk"])
def test_what_another_process_prints_is_not_printed_here(leave_with, error):
    error.is_reported_elsewhere = True
    assert leave_with(error, RANK="1") == (2, "")


def test_what_only_one_process_has_names_it(leave_with):
    assert leave_with(ConfigError("no file"), RANK="3") == (2, "error: rank 3: no file\n")


@pytest.mark.parametrize(("rank", "message"), [("0", "error: interrupted\n"), ("1", "")])
def test_one_process_says_that_all_were_interrupted(leave_with, rank, message):
    assert leave_with(KeyboardInterrupt(), RANK=rank) == (130, message)


def pretrain(*arguments, **environment):
    names = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "cli.py"), *TWO, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=names | environment,
    )


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as server:
        result = pretrain(MASTER_PORT=str(server.getsockname()[1]))
    assert result.returncode == 2
    assert result.stderr.startswith("error: MASTER_PORT")
    assert result.stderr.count("\n") == 1


def test_a_setting_that_no_process_can_read_is_one_line_under_torchrun_too():
    results = [
        pretrain("--set", "optim.lrr=1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        for rank in range(2)
    ]
    assert [result.returncode for result in results] == [2, 2]
    assert "did you mean 'lr'?" in results[0].stderr
    assert results[1].stderr == ""


def test_what_only_one_process_cannot_take_is_refused_by_all_and_said_once(tmp_path):
    """The other one sees nothing wrong, and would wait for it."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [CHECKOUT / "cli.py", *TWO, "--set", f"trainer.out_dir={tmp_path / 'run'}"]
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    processes = [
        forks.start([*line, *more], log, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, (log, more) in enumerate(zip(logs, ([], ["--set", "optim.lr=1e-9"]), strict=True))
    ]
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [2, 2]
    errors = [[line for line in log.read_text().splitlines() if line.startswith("error:")] for log in logs]
    assert len(errors[0]) == 1
    assert "rank 1: optim: lr_final" in errors[0][0]
    assert errors[1] == []


def test_several_machines_need_a_launcher():
    result = pretrain("--set", "trainer.num_nodes=2")
    assert result.returncode == 2
    assert "torchrun" in result.stderr
    assert result.stderr.count("\n") == 1
