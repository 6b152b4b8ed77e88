"""What ``main`` makes of errors that are not ours: one line and exit code 2, or a traceback."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_train import commands

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def leave_with(monkeypatch, capsys):
    """Run ``main`` with a command line that raises; return the exit code and what is on stderr."""

    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # main takes SIGTERM over

    def run(error):
        def app():
            raise error

        monkeypatch.setattr(commands, "app", app)
        with pytest.raises(SystemExit) as caught:
            commands.main()
        return caught.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EROFS, "Read-only file system; choose a place that can be written to"),
        (errno.ENOTDIR, "Not a directory; a part of the path is a file"),
    ],
    ids=["full", "read-only", "file"],
)
def test_what_the_disk_refuses_gets_a_line_with_the_place_and_the_fix(leave_with, number, fix):
    code, message = leave_with(OSError(number, os.strerror(number), "/there/x"))
    assert code == 2
    assert message.startswith(f"error: /there/x: {fix}")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"),
            " (it tried to allocate 2.00 GiB)",
        ),
        (
            RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 99 bytes.\nmore"),
            " (it tried to allocate 99 bytes)",
        ),
        (MemoryError(), ""),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_gets_a_line_with_what_to_lower(leave_with, error, size):
    code, message = leave_with(error)
    assert code == 2
    assert message.startswith(f"error: out of memory{size}; lower trainer.micro_batch_size")
    assert message.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def app():
        raise RuntimeError("shapes disagree")

    monkeypatch.setattr(commands, "app", app)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        commands.main()


def _is_being_written(folder):
    tokens = folder / "corpus.unfinished" / "tokens"
    return tokens.exists() and tokens.stat().st_size > 6e6  # more than the first block, so that one counts


def test_a_termination_leaves_nothing_that_looks_complete_and_says_how_to_go_on(tmp_path):
    text = tmp_path / "text.jsonl"
    with text.open("w") as file:
        file.writelines('{"text": "state and decay"}\n' for _ in range(1_000_000))
    arguments = ["prepare-data", "--input", text, "--tokenizer", "bytes", "--output", tmp_path / "out/corpus"]
    process = subprocess.Popen([sys.executable, CHECKOUT / "cli.py", *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not _is_being_written(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 143
    assert said.decode().endswith(
        "corpus.unfinished keeps what is done; the same command goes on from there\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus.unfinished"]
