"""Campaign ``faults``: what goes wrong around a run, one thing at a time, and what was promised for it.

Each fault is a function of ``faults_at_start`` or ``faults_while_running``, tried with one process, with two, or with
both. A row says how every start of its runs ended: exit code, seconds, and the lines that say why.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaigns import faults_at_start as at_start
from tests.campaigns import faults_while_running as running
from tests.campaigns.disk import can_mount
from tests.campaigns.record import AS_PROMISED, Row, outcome
from tests.campaigns.runs import make_corpus
from tests.campaigns.trial import References, Trial

NO_DISK = "not tried: no tmpfs can be mounted here (unshare, nsenter)"
ONE, TWO, BOTH = (1,), (2,), (1, 2)
FAULTS: dict[Callable[[Trial], None], tuple[int, ...]] = {
    at_start.full_disk: BOTH,
    at_start.read_only_folder: BOTH,
    at_start.read_only_folder_of_a_run: BOTH,
    at_start.two_runs_in_one_folder: BOTH,
    at_start.port_in_use: TWO,
    at_start.port_in_use_without_our_launcher: TWO,
    at_start.rank_with_another_config: TWO,
    at_start.rank_with_an_invalid_config: TWO,
    at_start.missing_rank: TWO,
    at_start.world_size_that_does_not_divide: TWO,
    at_start.checkpoint_of_another_model: BOTH,
    at_start.resume_from_another_model: BOTH,
    at_start.every_checkpoint_damaged: BOTH,
    running.full_disk_during_a_save: BOTH,
    running.full_disk_between_saves: BOTH,
    running.sigterm: BOTH,
    running.sigint: BOTH,
    running.sigusr1: BOTH,
    running.sigint_twice: BOTH,
    running.sigterm_and_too_little_time: BOTH,
    running.stopped_rank_0: TWO,
    running.stopped_rank_1: TWO,
    running.rank_stopped_for_a_while: TWO,
    running.flipped_bit: ONE,
    running.flipped_bit_in_several_files: ONE,
    running.nan_and_stop: BOTH,
    running.nan_and_skip: BOTH,
    running.nan_and_rollback: BOTH,
    running.nan_everywhere_and_skip: BOTH,
    running.infinite_weight: BOTH,
}
"""What is tried, and with how many processes."""
_NEED_A_DISK = {
    at_start.full_disk,
    at_start.read_only_folder,
    at_start.read_only_folder_of_a_run,
    running.full_disk_during_a_save,
    running.full_disk_between_saves,
}


class Fault(NamedTuple):
    """A fault with a number of processes."""

    try_it: Callable[[Trial], None]
    devices: int

    @property
    def name(self) -> str:
        return f"{self.try_it.__name__}, {self.devices} process{'es' if self.devices > 1 else ''}"


def faults() -> Iterator[Fault]:
    """Give out all of them."""
    for try_it, numbers in FAULTS.items():
        for devices in numbers:
            yield Fault(try_it, devices)


class FaultsTrial:
    """Tries faults, several at a time if asked from several threads.

    Args:
        work: folder for the runs; those of faults that were answered as promised are removed.
        is_timed: whether it counts how long something takes.
    """

    def __init__(self, work: Path, *, is_timed: bool = True) -> None:
        self._is_timed = is_timed
        self._work = work
        self._references = References(work / "undisturbed", make_corpus(work / "corpus"))
        shutil.rmtree(work / "undisturbed", ignore_errors=True)

    def run(self, fault: Fault) -> Row:
        """Try a fault; return its row."""
        started = time.monotonic()
        folder = self._work / f"{fault.try_it.__name__}-{fault.devices}"
        shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(folder, self._references, fault.devices, is_timed=self._is_timed)
        result = NO_DISK
        if fault.try_it not in _NEED_A_DISK or can_mount():
            try:
                fault.try_it(trial)
            except (OSError, LookupError, RuntimeError) as error:  # what it looks for is not there
                trial.problems.append(f"the trial ended early: {error!r}")
            finally:
                trial.kill_all()
            result = outcome(trial.problems)
        if result == AS_PROMISED:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.monotonic() - started, 1)
        load = round(os.getloadavg()[0], 1)  # others on this machine make everything slower
        return {"name": fault.name, **trial.row(), "outcome": result, "seconds": seconds, "load": load}


def totals(rows: list[Row]) -> Row:
    """Sum the faults up."""
    starts = [start for row in rows for start in row["starts"] if "exit_code" in start]
    refusals = [start["seconds"] for start in starts if start["exit_code"] == 2]
    return {
        "faults": len(rows),
        "as_promised": sum(row["outcome"] == AS_PROMISED for row in rows),
        "starts_by_exit_code": {
            str(code): n for code, n in sorted(Counter(s["exit_code"] for s in starts).items())
        },
        "longest_refusal_seconds": max(refusals, default=0),
    }
