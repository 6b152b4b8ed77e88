"""Signs of life that the processes of a run leave for each other, beside the collectives.

A thread of each process writes a sign (a count, the steps it has seen, what its main thread does) into the store at
which the processes met, over a connection of its own. When a collective breaks or nothing moves, whoever notices
first looks who is missing and declares one verdict for all: a process that leaves because of it is not blamed next.

Nothing here waits for the network for longer than a few seconds: the host of the store may be what hangs.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# torch has no stubs that export these names.
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from rwkv_train.errors import LostProcessError
from rwkv_train.parallel.last_words import say
from rwkv_train.parallel.world import World

INTERVAL_SECONDS = 0.5
SILENCE_SECONDS = 4.0
"""A process whose sign has not changed for so long is not running; a loaded machine delays a thread by less."""
LEAVING_SECONDS = 10.0
"""What a process has to end by itself after a verdict."""
_WAITS_IN = (str(Path("torch/distributed")), str(Path("torch/autograd/graph.py")))


class Sign(NamedTuple):
    """What a process says of itself."""

    number: int
    beats: int
    place: str
    """Innermost Python line of the main thread."""
    is_waiting: bool
    """Whether that line waits for other processes, as far as Python can tell."""
    left: str
    """How it left; empty while it takes part."""


class Seen(NamedTuple):
    """A process as another one sees it."""

    sign: Sign
    is_alive: bool
    """Whether its sign changed while it was looked at."""


class Verdict(NamedTuple):
    """Why the run ends, the same on all processes."""

    sentence: str
    by: int
    """Rank that found it, and says it."""


class Pulse:
    """The signs of one process, and its view of the others'.

    Args:
        world: place of this process.
        prefix: start of the keys in the store where the processes met; this class makes its own connection to it.
    """

    def __init__(self, world: World, prefix: str) -> None:
        self.world = world
        self.beats = 0
        self.last_beat = time.monotonic()
        self.verdict: Verdict | None = None
        self._verdict_time = 0.0
        self._prefix = prefix
        self._count = 0
        self._left = ""
        self._proposal: Verdict | None = None
        self._counts: dict[int, set[int]] | None = None
        self._signs: dict[int, Sign] = {}
        self._last_answer = 0.0
        self._is_cut_off = False
        self._looking = threading.Lock()
        self._wake = threading.Event()
        self._ends = threading.Event()
        self._store: Store | None = None
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self, connect_seconds: float) -> None:
        """Leave the first sign and keep on.

        Raises:
            torch.distributed.DistError: the store cannot be reached.
        """
        tcp = TCPStore(
            self.world.address,
            self.world.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=connect_seconds),
        )
        self._store = PrefixStore(f"{self._prefix}/pulse", tcp)
        self._exchange(self._store)
        self._thread.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def beat(self) -> None:
        """Note that this process made progress."""
        self.beats += 1
        self.last_beat = time.monotonic()

    def leave(self, why: str) -> None:
        """Leave a last sign that says why this process takes no more part; waits for it two seconds at most."""
        self._left = why
        if not self._is_cut_off:
            self._after_next_answer(2.0)
        self.stop()

    def stop(self) -> None:
        """End the threads; one that hangs with the store is left behind."""
        self._ends.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def look(self) -> dict[int, Seen] | None:
        """Return how all processes do, or None if the store does not answer; takes a few seconds."""
        with self._looking:  # the main thread, after a broken collective, and the watchdog
            start = time.monotonic()
            counts: dict[int, set[int]] = {rank: set() for rank in range(self.world.world_size)}
            self._signs = {}
            self._counts = counts
            self._wake.set()
            while (
                time.monotonic() < start + SILENCE_SECONDS and not self._is_cut_off and self.verdict is None
            ):
                time.sleep(INTERVAL_SECONDS / 5)
                if any(sign.left for sign in list(self._signs.values())):
                    break
            self._counts = None
            signs = dict(self._signs)
        if self._is_cut_off or len(signs) < self.world.world_size:
            return None
        me = self.world.rank
        return {rank: Seen(signs[rank], len(counts[rank]) > 1 or rank == me) for rank in sorted(signs)}

    def declare(self, sentence: str) -> Verdict:
        """Make this the verdict of all processes, unless another one was declared before; return the one."""
        self._proposal = Verdict(sentence, self.world.rank)
        if not self._is_cut_off and self.verdict is None:
            self._after_next_answer(2.0)
        if self.verdict is None:  # the store has gone: each one says what it knows
            self._set_verdict(self._proposal)
        assert self.verdict is not None
        return self.verdict

    def linger(self) -> None:
        """Let the others read the verdict before the store or a connection goes with this process."""
        if not self._is_cut_off:
            time.sleep(3 * INTERVAL_SECONDS)

    def _after_next_answer(self, seconds: float) -> None:
        """Wait until the store has answered a round of exchange that began after now."""
        for _ in range(2):  # one may be under way
            before, end = self._last_answer, time.monotonic() + seconds / 2
            self._wake.set()
            while self._last_answer == before and not self._is_cut_off and time.monotonic() < end:
                time.sleep(0.01)

    def _run(self) -> None:
        assert self._store is not None
        try:
            while not self._ends.is_set():
                self._wake.wait(INTERVAL_SECONDS)
                self._wake.clear()
                self._exchange(self._store)
        except RuntimeError:  # all of the store's errors; its host has gone
            self._is_cut_off = True

    def _exchange(self, store: Store) -> None:
        self._count += 1
        place, is_waiting = _place_of(sys._current_frames().get(threading.main_thread().ident or 0))
        store.set(
            str(self.world.rank), json.dumps(Sign(self._count, self.beats, place, is_waiting, self._left))
        )
        if self._proposal is not None:
            answer = store.compare_set("verdict", "", json.dumps(self._proposal))
            self._set_verdict(Verdict(*json.loads(answer)))
        elif store.check(["verdict"]):
            self._set_verdict(Verdict(*json.loads(store.get("verdict"))))
        counts = self._counts
        if counts is not None:
            for rank, value in enumerate(store.multi_get([str(rank) for rank in counts])):
                self._signs[rank] = Sign(*json.loads(value))
                counts[rank].add(self._signs[rank].number)
        self._last_answer = time.monotonic()

    def _set_verdict(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self._verdict_time = time.monotonic()
            self.verdict = verdict

    def _guard(self) -> None:
        """End this process when its launcher has vanished, or when it does not end after a verdict."""
        launcher = self.world.launcher
        while not self._ends.wait(INTERVAL_SECONDS):
            if launcher is not None and os.getppid() != launcher:
                if self.world.local_rank == 0:
                    say("the process that started this one has vanished; the same command goes on from here")
                os._exit(LostProcessError.exit_code)
            if self.verdict is not None and time.monotonic() > self._verdict_time + LEAVING_SECONDS:
                if self.verdict.by == self.world.rank:
                    say(self.verdict.sentence)
                os._exit(LostProcessError.exit_code)


def _place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Name the line that a thread is at, and tell whether it waits for other processes."""
    if frame is None:
        return "unknown", False
    code = frame.f_code
    file = Path(*Path(code.co_filename).parts[-2:])
    place = f"{file}:{frame.f_lineno} in {code.co_name}"
    outer: FrameType | None = frame
    while outer is not None:
        if any(part in outer.f_code.co_filename for part in _WAITS_IN):
            return place, True
        outer = outer.f_back
    return place, False
