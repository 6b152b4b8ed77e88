"""Signals that ask a run to stop: noted now, acted on at the end of the step, enforced after a grace time."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from rwkv_train.parallel.last_words import say

logger = logging.getLogger(__name__)

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C; the usual request to end; what SLURM can send before a time limit (``--signal=USR1@120``)."""


class StopSignal:
    """Ctrl-C, SIGTERM and SIGUSR1. A second Ctrl-C stops at once; so does the end of the grace time.

    A thread listens, so that a signal is answered even while the main thread waits for other processes in a
    collective, where Python's own handlers do not run.

    Args:
        grace_seconds: time for the step and the save.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.received: signal.Signals | None = None
        self._grace_seconds = grace_seconds
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._previous_fd = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._is_over = threading.Event()

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def listen(self) -> None:
        """Take over the signals; again after another library has taken them. Call it in the main thread."""
        for number in STOPPING:
            previous = signal.signal(number, self._note)
            self._previous.setdefault(number, previous)
        if self._sockets is None:
            ours, pythons = self._sockets = socket.socketpair()
            pythons.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
            self._is_over = threading.Event()
            threading.Thread(
                target=self._read, args=(ours, self._is_over), name="signals", daemon=True
            ).start()

    def ignore(self) -> None:
        """Give the signals back to whoever had them; a grace time that has begun ends with it."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._sockets is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._sockets[1].close()  # ends the thread
            self._sockets = None
        self._is_over.set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)

    def _read(self, ours: socket.socket, is_over: threading.Event) -> None:
        first: int | None = None
        with ours:
            while arrived := ours.recv(1):
                number = arrived[0]
                if number not in STOPPING:
                    continue
                if first is None:
                    first = number
                    self._note(number, None)
                    self._announce(number)
                    threading.Thread(target=self._enforce, args=(number, is_over), daemon=True).start()
                # Of the others one request can arrive twice: from SLURM, and passed on by a launcher.
                elif number == first == signal.SIGINT:
                    os._exit(128 + number)

    def _announce(self, number: int) -> None:
        logger.info(
            "%s: saving after this step, within %g s%s",
            signal.Signals(number).name,
            self._grace_seconds,
            "; once more stops at once" if number == signal.SIGINT else "",
        )

    def _enforce(self, number: int, is_over: threading.Event) -> None:
        if is_over.wait(self._grace_seconds):
            return
        say(
            f"the step and the save did not end within {self._grace_seconds:g} s (trainer.grace_seconds) of "
            f"{signal.Signals(number).name}; the same command goes on from the last complete checkpoint"
        )
        os._exit(128 + number)
