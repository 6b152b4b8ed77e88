"""One fault: the runs it takes, what they were promised to do, and what they did."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.campaigns.record import Row
from tests.campaigns.runs import Command, Ended, SmallRun, look, newest_step

REFUSED = 2
LOST = 75
REFUSED_WITHIN_SECONDS = 30.0
STEPS = 60
_WITHOUT_EFFECT = ("trainer.hang_timeout_seconds", "trainer.grace_seconds", "guard.action")
"""Settings that a run which nobody disturbs ends alike with."""


class References:
    """Runs that nobody disturbs, each made once.

    Args:
        folder: where they go.
        corpus: what they train on.
    """

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.corpus = corpus
        self._folder = folder
        self._runs: dict[str, SmallRun] = {}
        self._lock = threading.Lock()

    def get(self, changes: Mapping[str, Any]) -> SmallRun:
        """Return the undisturbed run with these settings, which keeps all its checkpoints."""
        key = repr(sorted(changes.items()))
        with self._lock:
            if key not in self._runs:
                keeps = {**changes, "checkpoint.keep_last": 1000}
                run = SmallRun(self._folder / f"undisturbed-{len(self._runs)}", self.corpus, keeps)
                ended = run.start().wait()
                if ended.code:
                    raise RuntimeError(f"the undisturbed run failed:\n{ended.log}")
                self._runs[key] = run
        return self._runs[key]


class Trial:
    """Notes what the runs of one fault do, and what of it is not as promised.

    Args:
        folder: for the runs.
        references: undisturbed runs.
        devices: number of processes.
        is_timed: whether it counts how long something takes; not where other work may slow it down.
    """

    def __init__(self, folder: Path, references: References, devices: int, *, is_timed: bool = True) -> None:
        self.folder = folder
        self.devices = devices
        self.corpus = references.corpus
        self.problems: list[str] = []
        self.starts: list[Row] = []
        self._is_timed = is_timed
        self._references = references
        self._runs: list[SmallRun] = []
        self._changes: dict[int, dict[str, Any]] = {}

    def run(
        self,
        changes: Mapping[str, Any] | None = None,
        *,
        out_dir: Path | None = None,
        launched: bool = True,
    ) -> SmallRun:
        """Make a run; nothing is started yet.

        Args:
            changes: its settings, besides the number of processes.
            out_dir: folder of the run, if not its own.
            launched: whether our launcher is to start the processes.
        """
        full = {"trainer.devices": self.devices, "trainer.max_steps": STEPS, **(changes or {})}
        run = SmallRun(self.folder / f"run-{len(self._runs) + 1}", self.corpus, full, out_dir=out_dir)
        self._runs.append(run)
        self._changes[id(run)] = full
        return run

    def reference(self, run: SmallRun) -> SmallRun:
        """Return the undisturbed run with the settings of this one."""
        changes = {k: v for k, v in self._changes[id(run)].items() if k not in _WITHOUT_EFFECT}
        return self._references.get(changes)

    def promise(self, is_kept: bool, problem: str) -> None:
        """Note a problem unless a promise was kept."""
        if not is_kept:
            self.problems.append(problem)

    def ends(
        self,
        command: Command,
        code: int,
        *,
        within: float,
        errors: int = 1,
        says: str = "",
        after: float = 0.0,
    ) -> Ended:
        """Wait for the end of a command and compare it with what was promised.

        Args:
            command: what runs.
            code: the exit code that is right.
            within: seconds that it may take to end from ``after`` on.
            errors: how many lines say why.
            says: what is in such a line.
            after: when that which ends it happened, in seconds after its start.
        """
        ended = command.wait(after + 8 * within)
        seconds = round(ended.seconds - after, 2)
        errors_said = [line.replace(f"{self.folder.parent}/", "") for line in ended.errors]
        self.starts.append({"exit_code": ended.code, "seconds": seconds, "errors": errors_said})
        self.promise(ended.code == code, f"exit code {ended.code}, not {code}")
        self.promise(seconds <= within or not self._is_timed, f"it took {seconds} s")
        self.promise(len(ended.errors) == errors, f"{len(ended.errors)} lines of errors, not {errors}")
        self.promise(says in " ".join(ended.errors), f"no error says '{says}'")
        self.promise(not ended.has_traceback, "there is a traceback")
        if left := command.outlived_by(10):
            self.problems.append(f"processes {left} were left")
            command.kill_all()
        return ended

    def refused(self, command: Command, says: str, *, errors: int = 1) -> Ended:
        """Expect that a command refuses to start."""
        return self.ends(command, REFUSED, within=REFUSED_WITHIN_SECONDS, errors=errors, says=says)

    def goes_on(self, run: SmallRun, command: Command, seen_as: Path | None = None) -> Ended:
        """Expect that a command takes a run to its end, and that this end is the undisturbed one, bit for bit.

        Args:
            run: the run.
            command: the start that is to do it.
            seen_as: its folder, where this process sees it under another name.
        """
        out_dir = seen_as or run.out_dir
        ended = self.ends(command, 0, within=120, errors=0)
        wanted = look(self.reference(run).out_dir)
        found = look(out_dir)
        self.promise(not found.broken and not found.temporary, f"{found.broken + found.temporary} lie there")
        self.promise(found.newest == wanted.newest, f"it ended at step {found.newest}, not {wanted.newest}")
        for step, files in found.whole.items():
            self.promise(files == wanted.whole.get(step), f"step {step} is not that of the undisturbed run")
        return ended

    def wait_for_step(self, command: Command, out_dir: Path, step: int) -> None:
        """Wait until a run has saved a step."""
        while command.is_running and newest_step(out_dir) < step:
            time.sleep(0.005)
        self.promise(command.is_running, f"it ended before step {step}")

    def row(self) -> Row:
        """Return what was noted."""
        return {"devices": self.devices, "starts": self.starts}

    def kill_all(self) -> None:
        """Kill whatever is left."""
        for run in self._runs:
            run.kill_all()
