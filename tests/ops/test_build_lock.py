"""The lock of builders: killed ones, other nodes, a shared folder, and never waiting for ever."""

import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from rwkv_train.ops import build_lock
from rwkv_train.ops.build_lock import Holder, hold_lock

HOLD_AND_WAIT = """
import sys, time
from pathlib import Path
from rwkv_train.ops.build_lock import hold_lock
with hold_lock(Path(sys.argv[1]), "it", lambda: False) as folder:
    (folder / "half a library").write_bytes(bytes(1000))
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "library.lock"


def hold(lock, is_done=lambda: False, **options):
    return hold_lock(lock, "the kernel 'it'", is_done, **options)


def write_lock(lock, age=0.0, **changes):
    """A lock of this process, or of the one that ``changes`` make of it."""
    entries = Holder.this_process()._asdict() | changes
    lock.write_text(json.dumps(entries))
    os.utime(lock, (time.time() - age,) * 2)


def a_process_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_and_its_folder_are_there_while_it_is_held_and_gone_afterwards(lock):
    with hold(lock) as folder:
        assert lock.is_file()
        assert (folder.parent, list(folder.iterdir())) == (lock.parent, [])
        assert Holder.read(lock).pid == os.getpid()
    assert list(lock.parent.iterdir()) == []


def test_an_error_while_it_is_held_frees_it(lock):
    with pytest.raises(RuntimeError), hold(lock):
        raise RuntimeError
    assert list(lock.parent.iterdir()) == []


def test_a_second_one_waits_and_then_finds_the_work_done(lock):
    done, order = threading.Event(), []

    def second():
        with hold(lock, done.is_set) as folder:
            order.append(("second", folder))

    with hold(lock):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.5)
        order.append(("first", None))
        done.set()
    waiting.join(timeout=10)
    assert order == [("first", None), ("second", None)]


def test_the_lock_of_a_killed_process_is_taken_over_at_once_with_what_it_left(lock, caplog):
    process = subprocess.Popen([sys.executable, "-c", HOLD_AND_WAIT, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    process.kill()
    process.communicate()
    assert len(list(lock.parent.iterdir())) == 2
    began = time.monotonic()
    with hold(lock):
        assert time.monotonic() - began < 5
        assert len(list(lock.parent.iterdir())) == 2  # lock and folder, both ours
    assert (
        f"process {process.pid} on {platform.node()} was to make the kernel 'it' and has ended" in caplog.text
    )
    assert list(lock.parent.iterdir()) == []


def test_a_process_number_that_was_given_again_does_not_keep_a_lock(lock):
    write_lock(lock, started="1")  # this process' number, but another one's start
    with hold(lock) as folder:
        assert folder is not None


@pytest.mark.parametrize("where", ["host", "numbering"])
def test_a_process_number_of_another_node_or_container_says_nothing_here(lock, where, caplog):
    write_lock(lock, pid=a_process_that_has_ended(), **{where: "elsewhere"})
    began = time.monotonic()
    with hold(lock, stale_seconds=1):
        assert time.monotonic() - began > 0.8
    assert "gave no sign of life" in caplog.text


def test_a_lock_of_another_node_without_a_sign_of_life_is_stale(lock, caplog):
    write_lock(lock, age=3600, host="node-7", pid=12345)
    began = time.monotonic()
    with hold(lock) as folder:
        assert folder is not None
    assert time.monotonic() - began < 5
    assert "process 12345 on node-7" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_a_lock_that_names_nobody_is_stale_after_a_while(lock, content):
    lock.write_text(content)
    os.utime(lock, (0, 0))
    with hold(lock) as folder:
        assert folder is not None


def test_a_holder_that_lives_shows_it(lock, monkeypatch):
    monkeypatch.setattr(build_lock, "HEARTBEAT_SECONDS", 0.1)
    with hold(lock):
        os.utime(lock, (0, 0))
        time.sleep(0.5)
        assert time.time() - lock.stat().st_mtime < 10


def test_a_holder_that_was_taken_for_dead_leaves_the_next_ones_lock_alone(lock, monkeypatch):
    monkeypatch.setattr(build_lock, "HEARTBEAT_SECONDS", 0.1)
    with hold(lock):
        write_lock(lock, age=1000)  # another one took it over
        time.sleep(0.4)
        assert time.time() - lock.stat().st_mtime > 900
    assert lock.is_file()


def test_nobody_waits_for_ever_for_one_that_lives(lock, caplog):
    write_lock(lock)
    with hold(lock, patience_seconds=0.5) as folder:
        assert folder is not None
    assert "has been making the kernel 'it' for more than" in caplog.text
    assert lock.is_file()  # still the other one's


def test_nobody_waits_for_ever_for_a_lock_that_is_there_and_is_not(lock):
    lock.symlink_to("nowhere")
    with hold(lock, patience_seconds=0.5) as folder:
        assert folder is not None


def test_one_that_waits_says_for_whom(lock, caplog, monkeypatch):
    monkeypatch.setattr(build_lock, "_FIRST_REPORT_SECONDS", 0.2)
    write_lock(lock, host="node-7", pid=12345)
    with caplog.at_level(logging.WARNING), hold(lock, stale_seconds=1.5):
        pass
    assert caplog.text.count("waiting for process 12345 on node-7 to make the kernel 'it'") == 1


def test_several_that_find_one_stale_lock_all_come_to_an_end(lock):
    write_lock(lock, age=3600, host="node-7")
    done = lock.with_suffix(".so")
    made = []

    def make():
        with hold(lock, done.is_file) as folder:
            if folder is not None:
                made.append(folder)
                (folder / "library").touch()
                (folder / "library").replace(done)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert list(lock.parent.iterdir()) == [done]
    assert len(set(made)) == len(made)


def test_a_folder_that_cannot_be_written_is_said_not_waited_for(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), hold(tmp_path / "file" / "library.lock"):  # noqa: PT011 - which one is the system's choice
        pass
