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


@pytest.fixture
def pretrain_in_two(tmp_path):
    """Start two processes as torchrun does, with words for both and for the second; return codes and logs."""

    def run(of_both=(), of_the_second=()):
        line = [CHECKOUT / "cli.py", *TWO, "--set", f"trainer.out_dir={tmp_path / 'run'}", *of_both]
        logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
        codes = forks.end(forks.start_ranks([line, [*line, *of_the_second]], logs), 60)
        return codes, [log.read_text() for log in logs]

    return run


def test_a_setting_that_no_process_can_read_is_one_line_under_torchrun_too(pretrain_in_two):
    codes, logs = pretrain_in_two(["--set", "optim.lrr=1"])
    assert codes == [2, 2]
    assert "did you mean 'lr'?" in logs[0]
    assert logs[1] == ""


def test_what_only_one_process_cannot_take_is_refused_by_all_and_said_once(pretrain_in_two):
    """The other one sees nothing wrong, and would wait for it."""
    codes, logs = pretrain_in_two(of_the_second=["--set", "optim.lr=1e-9"])
    assert codes == [2, 2]
    assert logs[0].count("error:") == 1
    assert "error: rank 1: optim: lr_final" in logs[0]
    assert "error:" not in logs[1]


def test_several_machines_need_a_launcher():
    result = pretrain("--set", "trainer.num_nodes=2")
    assert result.returncode == 2
    assert "torchrun" in result.stderr
    assert result.stderr.count("\n") == 1
