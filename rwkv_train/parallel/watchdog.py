"""Ends a run that hangs, and says which process holds the others up."""

import logging
import os
import threading
import time
from collections.abc import Mapping

from rwkv_train.errors import LostProcessError
from rwkv_train.parallel.last_words import say
from rwkv_train.parallel.lost import after_no_progress
from rwkv_train.parallel.processes import Processes
from rwkv_train.parallel.pulse import Seen

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.25


class Watchdog:
    """A thread that ends this process when ``beat`` was not called for too long, and all others with it.

    A process that waits for another in a collective cannot notice by itself that this one was stopped or hangs. The
    watchdogs look at each other's signs of life instead, agree on who is behind, print one sentence and leave with
    exit code 75, all within some 20 seconds. Alone it does nothing: there a slow step is just a slow step.

    Args:
        processes: those of the run.
        timeout_seconds: longest time between two beats.
    """

    def __init__(self, processes: Processes, timeout_seconds: float) -> None:
        self._pulse = processes.pulse
        self._rank = processes.rank
        self._timeout_seconds = timeout_seconds
        self._ends = threading.Event()

    def start(self) -> None:
        """Begin to watch, also once more after ``stop``; the time before does not count."""
        if self._pulse is None:
            return
        self.stop()
        self._ends = threading.Event()
        self._pulse.beat()
        threading.Thread(target=self._run, args=(self._ends,), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Note progress; costs nothing. Between two beats lies at most one thing that waits for other processes."""
        if self._pulse is not None:
            self._pulse.beat()

    def stop(self) -> None:
        """Watch no more."""
        self._ends.set()

    def _run(self, ends: threading.Event) -> None:
        assert self._pulse is not None
        # After a verdict of another process it is the pulse's guard that sees to the end.
        while not ends.wait(CHECK_SECONDS) and self._pulse.verdict is None:
            if time.monotonic() > self._pulse.last_beat + self._timeout_seconds:
                beats = self._pulse.beats
                seen = self._pulse.look()
                if self._pulse.beats == beats and not ends.is_set():  # else it was just slow
                    self._end(seen)

    def _end(self, seen: Mapping[int, Seen] | None) -> None:
        assert self._pulse is not None
        if self._pulse.verdict is not None:
            return
        verdict = self._pulse.declare(after_no_progress(self._pulse.world, seen, self._timeout_seconds))
        if verdict.by == self._rank:
            say(verdict.sentence)
            logger.debug(verdict.sentence)  # for the log file: the terminal has it
        self._pulse.linger()
        os._exit(LostProcessError.exit_code)
