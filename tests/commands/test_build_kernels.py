"""The command that builds kernels ahead of time, with a compiler that only pretends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rwkv_train.commands import app, main
from rwkv_train.ops import cuda_toolkit
from rwkv_train.ops.build_lock import Holder
from rwkv_train.ops.cuda_build import ARCHITECTURES, Built, find_source

NVCC = """#!/bin/sh
case "$1" in
    --version) echo "release 13.0, V13.0.88"; exit ;;
    --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\nsm_120\\n'; exit ;;
esac
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then echo built > "$2"; fi
    shift
done
"""


@pytest.fixture(autouse=True)
def nvcc(tmp_path, monkeypatch):
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC)
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    cuda_toolkit._ask_nvcc.cache_clear()
    yield path
    cuda_toolkit._ask_nvcc.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kernels"


def run(*arguments):
    return CliRunner().invoke(app, ["build-kernels", *map(str, arguments)])


def built_in(folder):
    return [Built.parse(path.name) for path in sorted(folder.iterdir())]


def test_all_operators_are_built_for_the_chips_that_are_named(folder):
    result = run("--arch", "sm_90", "--arch", "sm_80", "--cache-folder", folder)
    assert result.exit_code == 0, result.output
    built = built_in(folder)
    assert {library.op for library in built} >= {"wkv4", "wkv5", "wkv6", "wkv7"}
    assert {library.architectures for library in built} == {("sm_80", "sm_90")}
    assert all(str(folder / library.file_name) in result.stdout for library in built)


def test_one_operator_can_be_built_for_every_chip(folder):
    result = run("--arch", "all", "--op", "wkv7", "--output", folder)
    assert result.exit_code == 0, result.output
    assert [(library.op, library.architectures) for library in built_in(folder)] == [("wkv7", ARCHITECTURES)]


def test_what_is_there_is_built_again_only_if_that_is_asked_for(folder):
    words = ("--arch", "sm_90", "--op", "wkv7", "--cache-folder", folder)
    run(*words)
    (library,) = folder.iterdir()
    first = library.stat().st_ino
    run(*words)
    assert library.stat().st_ino == first
    run(*words, "--anew")
    assert library.stat().st_ino != first


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--op", "wkv8"], "--op wkv8: there is no CUDA kernel of this name; choose from"),
        (["--arch", "all", "--arch", "sm_90"], "--arch all stands alone"),
        (["--arch", "sm_61"], "sm_61 is too old: the kernels need sm_70"),
        (["--arch", "sm_70"], "does not compile for sm_70: CUDA 13 dropped it"),
        (["--arch", "sm_999"], "does not compile for sm_999"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_exit_code_2(folder, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(sys, "argv", ["rwkv-train", "build-kernels", "--cache-folder", str(folder), *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 2
    assert sentence in said.err
    assert said.err.count("error:") == 1


def test_without_nvcc_it_says_where_it_looked(nvcc, folder, monkeypatch, capsys, tmp_path):
    nvcc.unlink()
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.setattr(cuda_toolkit, "USUAL_PLACE", tmp_path / "none")
    monkeypatch.setattr(cuda_toolkit, "_folders_of_packages", list)
    monkeypatch.setattr(sys, "argv", ["rwkv-train", "build-kernels", "--cache-folder", str(folder)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "nvcc, the CUDA compiler, was not found (looked in CUDA_HOME=" in capsys.readouterr().err


# --- being stopped


def start(folder):
    """The command in a process and a group of its own, as a shell starts it."""
    # Where the suite runs in the background of a script, all it starts inherits that Ctrl-C is ignored.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{hears}; from rwkv_train.commands import main; main()"
    words = [
        "build-kernels",
        "--arch",
        "sm_90",
        "--op",
        "wkv7",
        "--op",
        "wkv6",
        "--cache-folder",
        str(folder),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(happened):
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def end(process, number):
    """Send Ctrl-C as a terminal does, to the whole group, any other signal to the one process."""
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 20, said
    assert "Traceback" not in said
    return process.returncode


by_signal = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)


@pytest.fixture
def begun(nvcc, tmp_path):
    """The file in which compilers that do not end by themselves write who they are."""
    path = tmp_path / "begun"
    nvcc.write_text(NVCC.replace("while", f"echo $$ >> {path}; sleep 300\nwhile", 1))
    return path


@by_signal
def test_a_signal_ends_it_at_once_and_nothing_is_left_in_the_folder(folder, begun, number, code):
    process = start(folder)
    wait_until(lambda: begun.exists() and len(begun.read_text().split()) >= 2)
    assert end(process, number) == code
    assert list(folder.iterdir()) == []


@pytest.mark.slow  # on a machine that is busy with the whole suite one was once seen to live on
@by_signal
def test_a_signal_ends_the_compilers(folder, begun, number, code):
    process = start(folder)
    wait_until(lambda: begun.exists() and len(begun.read_text().split()) >= 2)
    assert end(process, number) == code
    # An ended one may still be listed until its new parent has noticed.
    wait_until(lambda: not any(Path(f"/proc/{pid}/cwd").exists() for pid in begun.read_text().split()))


@by_signal
def test_a_signal_ends_it_while_it_waits_for_another_builder(folder, number, code):
    folder.mkdir()
    for op in ("wkv6", "wkv7"):
        source = find_source(op)
        built = Built(op, source.hash, os.uname().machine, "13.0.88", ("sm_90",))
        lock = (folder / built.file_name).with_suffix(".lock")
        lock.write_text(json.dumps(Holder.this_process()._asdict()))  # it lives
    process = start(folder)
    line = process.stderr.readline()
    assert "waiting for process" in line
    assert end(process, number) == code
    assert {path.suffix for path in folder.iterdir()} == {".lock"}
