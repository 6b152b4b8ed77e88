"""Apply a function to many items in several processes, in order and in bounded memory.

Each process answers one item at a time over a pipe of its own: neither side ever writes while the other one does,
and a process that is gone is noticed at once.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from rwkv_train.errors import LostProcessError, RwkvTrainError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4
"""Items for each process that may be begun after the one that is waited for."""

_BYTES_OF_A_WORKER = 1 << 22
"""Stored bytes for which another process is worth its start."""

_END = object()


def suitable_workers(sizes: Sequence[int | None]) -> int:
    """Return the number of processes for inputs of so many bytes as stored; ``None``: not known, so all cores."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = [size for size in sizes if size is not None]
    return n_cores if len(known) < len(sizes) else min(n_cores, 1 + sum(known) // _BYTES_OF_A_WORKER)


def ordered_map(
    make: Callable[[], Callable[[Item], Result]], items: Iterator[Item], n_workers: int
) -> Generator[Result]:
    """Yield the results of a function in the order of the items.

    Args:
        make: returns the function; called once in each process. With several it must be picklable, and so must
            items and results.
        items: taken from as processes become free.
        n_workers: processes; 1: this one, and no other is started.

    Raises:
        LostProcessError: a process ended, most often because the system's memory was short.
        Exception: what the function or ``items`` raised, after the results of all items before.
    """
    if n_workers == 1:
        yield from map(make(), items)
        return
    with _processes(make, n_workers) as connections:
        yield from _distribute(connections, items)


def _distribute(connections: list[Connection], items: Iterator[Item]) -> Iterator[Any]:
    idle = list(connections)
    busy: dict[Connection, int] = {}  # the number of the item
    results: dict[int, Any] = {}
    n_sent = n_yielded = 0
    upcoming, problem = _next(items)
    while True:
        while idle and upcoming is not _END and n_sent - n_yielded < _AHEAD * len(connections):
            connection = idle.pop()
            _send(connection, upcoming)
            busy[connection] = n_sent
            n_sent += 1
            upcoming, problem = _next(items)
        if not busy:
            break
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            results[busy.pop(ready)] = _receive(ready)
            idle.append(ready)
        while n_yielded in results:
            result = results.pop(n_yielded)
            n_yielded += 1
            if isinstance(result, BaseException):
                raise result
            yield result
    if problem is not None:
        raise problem


def _next(items: Iterator[Any]) -> tuple[Any, RwkvTrainError | None]:
    """Return the next item; an error of the source waits until what came before is done."""
    try:
        return next(items, _END), None
    except RwkvTrainError as error:
        return _END, error


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send(item)
    except (BrokenPipeError, ConnectionResetError):
        raise _lost() from None


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise _lost() from None


def _lost() -> LostProcessError:
    return LostProcessError(
        "a worker process was ended from outside, most often because the memory was full: start the same command "
        "again, with fewer --workers; it goes on where it was"
    )


@contextmanager
def _processes(make: Callable[[], Callable[[Any], Any]], n_workers: int) -> Iterator[list[Connection]]:
    """Start processes; however the block is left, they are gone after it."""
    # A fresh interpreter each: a copy of this one would share its threads' locks.
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        with _deaf_to_interrupts():
            for _ in range(n_workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(make, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
        yield connections
    finally:
        for process in processes:
            process.kill()  # it writes nothing but to us
        for process in processes:
            process.join()
        for connection in connections:
            connection.close()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let processes that are started be born so: Ctrl-C reaches the whole group, and is this process's to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(make: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    """Answer items until the other side is gone."""
    # As many processes as cores: threads of the tokenizers' own would only take turns.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    function: Callable[[Any], Any] | None = None
    try:
        while True:
            item = connection.recv()
            try:
                function = function or make()
                answer = function(item)
            except Exception as error:  # noqa: BLE001 - raised again where the result is asked for
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
