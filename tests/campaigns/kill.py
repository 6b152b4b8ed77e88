"""Campaign ``kill``: runs killed at random moments end as the undisturbed run does, bit for bit.

A case is a run that is killed one to three times and then left to end. Which processes are killed, under which
strategy and when is a function of the number of the case. After each kill every checkpoint that lies in the folder
must be whole and equal to that of the undisturbed run at its step, and the next start must go on from the newest.
"""

import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_train.checkpoints import load_training_checkpoint
from tests.campaigns.record import AS_PROMISED, Row, outcome
from tests.campaigns.runs import Command, Ended, Left, SmallRun, kill, look, make_corpus, newest_step

KINDS = {
    "one": "the only process",
    "job": "two ranks and their launcher, all at once",
    "launcher": "the launcher of two ranks, which have to end by themselves",
    "rank": "one of two ranks, after which the other one and the launcher have to end with exit code 75 and name it",
}
DECK = {
    ("one", "auto"): 52,
    ("one", "fsdp2"): 2,
    ("one", "deepspeed_1"): 1,
    ("one", "deepspeed_2"): 1,
    ("one", "deepspeed_3"): 1,
    ("job", "ddp"): 12,
    ("job", "fsdp2"): 2,
    ("job", "deepspeed_1"): 1,
    ("job", "deepspeed_2"): 1,
    ("job", "deepspeed_3"): 1,
    ("launcher", "ddp"): 4,
    ("launcher", "fsdp2"): 1,
    ("launcher", "deepspeed_3"): 1,
    ("rank", "ddp"): 14,
    ("rank", "fsdp2"): 3,
    ("rank", "deepspeed_1"): 1,
    ("rank", "deepspeed_2"): 1,
    ("rank", "deepspeed_3"): 1,
}
"""How many of a hundred cases are of a kind and a strategy; a start of DeepSpeed takes long."""
STEPS = {"auto": 60, "ddp": 60}
SLOW_STEPS = 16
"""Length of a run, in steps, under the strategies that are not in ``STEPS``."""
START_SECONDS = 4.0
"""The longest delay of a kill that does not wait for a step; twice that where there are two ranks."""
ENDS_WITHIN_SECONDS = 60.0
"""What the processes of a job may take to end when one of them was killed."""
_GOING_ON = re.compile(r"going on from \S*/step-(\d+)")


class Moment(NamedTuple):
    """When a run is killed."""

    waits_for: str
    """"start": nothing; "step": a checkpoint; "save": the next one that is being written after that."""
    share: float
    """Which of the steps that remain, from 0 to 1."""
    delay: float
    """Seconds after that."""
    rank: int
    """Which rank, where one is killed."""


class Case(NamedTuple):
    """A run and what is done to it."""

    seed: int
    kind: str
    strategy: str
    moments: tuple[Moment, ...]

    @property
    def devices(self) -> int:
        return 1 if self.kind == "one" else 2

    @property
    def steps(self) -> int:
        return STEPS.get(self.strategy, SLOW_STEPS)


def cases() -> Iterator[Case]:
    """Give out the cases, in an order that mixes the kinds, for ever."""
    deck = [pair for pair, n in DECK.items() for _ in range(n)]
    random.Random(0).shuffle(deck)
    seed = 0
    while True:
        yield make_case(seed, *deck[seed % len(deck)])
        seed += 1


def make_case(seed: int, kind: str, strategy: str) -> Case:
    """Draw when a run is killed."""
    chance = random.Random(seed)
    moments = []
    for _ in range(chance.choice((1, 2, 3, 3))):
        waits_for = chance.choices(("start", "step", "save"), (15, 35, 50))[0]
        longest = {"start": START_SECONDS * (1 if kind == "one" else 2), "step": 0.08, "save": 0.01}[
            waits_for
        ]
        moments.append(
            Moment(
                waits_for,
                round(chance.random(), 3),
                round(chance.uniform(0, longest), 4),
                chance.randrange(2),
            )
        )
    return Case(seed, kind, strategy, tuple(moments))


class KillTrial:
    """Runs cases, several at a time if asked from several threads.

    Args:
        work: folder for the runs; those of cases that were as promised are removed.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._corpus = make_corpus(work / "corpus")
        self._references: dict[tuple[int, str], SmallRun] = {}
        self._locks: dict[tuple[int, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def run(self, case: Case) -> Row:
        """Run a case; return its row."""
        started = time.monotonic()
        reference = self._undisturbed(case)
        expected = look(reference.out_dir)
        run = self._make_run(f"case-{case.seed:04d}", case, keep_last=2)
        problems: list[str] = []
        kills: list[Row] = []
        before = Left({}, [], [])
        try:
            for moment in case.moments:
                command = run.start()
                done = _kill_at(moment, case, command, run.out_dir)
                ended = command.wait(ENDS_WITHIN_SECONDS if done else 0.1)
                left_behind = command.outlived_by(ENDS_WITHIN_SECONDS)
                problems += _problems_of_the_start(ended, before)
                if not done:
                    problems += ["it ended before it was killed"] if ended.code else []
                    break
                problems += _problems_of_the_end(case, moment, ended, left_behind)
                before = look(run.out_dir)
                problems += _problems_of_the_folder(before, expected)
                kills.append(
                    {
                        **moment._asdict(),
                        "exit_code": ended.code,
                        "seconds_to_the_kill": round(done - command.started, 2),
                        "seconds_to_the_end": round(time.monotonic() - done, 2),
                        "newest_checkpoint": before.newest,
                        "during_a_save": bool(before.temporary),
                    }
                )
            command = run.start()
            ended = command.wait()
            problems += _problems_of_the_start(ended, before)
            if ended.code:
                problems.append(f"the last start ended with exit code {ended.code}: {ended.errors}")
            else:
                problems += _problems_of_the_result(run, reference, case.steps)
            if left_behind := command.outlived_by(2):
                problems.append(f"processes {left_behind} outlived the last start")
        finally:
            run.kill_all()
        if not problems:
            shutil.rmtree(run.folder)
        return {
            "seed": case.seed,
            "kind": case.kind,
            "strategy": case.strategy,
            "devices": case.devices,
            "steps": case.steps,
            "kills": kills,
            "outcome": outcome(list(dict.fromkeys(problems))),
            "seconds": round(time.monotonic() - started, 1),
        }

    def _undisturbed(self, case: Case) -> SmallRun:
        """Return the run that nobody kills, of the same number of processes and strategy; it is made once."""
        key = (case.devices, case.strategy)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._references:
                name = f"undisturbed-{case.devices}-{case.strategy}"
                shutil.rmtree(self._work / name, ignore_errors=True)
                run = self._make_run(name, case, keep_last=case.steps)
                ended = run.start().wait()
                if ended.code or look(run.out_dir).newest != case.steps:
                    raise RuntimeError(f"the undisturbed run failed:\n{ended.log}")
                self._references[key] = run
        return self._references[key]

    def _make_run(self, name: str, case: Case, keep_last: int) -> SmallRun:
        shutil.rmtree(self._work / name, ignore_errors=True)
        changes: dict[str, Any] = {
            "trainer.strategy": case.strategy,
            "trainer.devices": case.devices,
            "trainer.max_steps": case.steps,
            "checkpoint.keep_last": keep_last,
            "checkpoint.max_file_gb": 1e-4,  # several files, so a save that takes longer
        }
        return SmallRun(self._work / name, self._corpus, changes)


def totals(rows: list[Row]) -> Row:
    """Sum the cases up."""
    kills = [(row, one) for row in rows for one in row["kills"]]
    return {
        "runs": len(rows),
        "kills": len(kills),
        "kills_by_kind": dict(Counter(row["kind"] for row, _ in kills)),
        "kills_by_strategy": dict(Counter(f"{row['devices']} x {row['strategy']}" for row, _ in kills)),
        "kills_during_a_save": sum(one["during_a_save"] for _, one in kills),
        "kills_before_the_first_checkpoint": sum(one["newest_checkpoint"] is None for _, one in kills),
        "as_promised": sum(row["outcome"] == AS_PROMISED for row in rows),
        "longest_end_of_the_others_seconds": max(
            (one["seconds_to_the_end"] for row, one in kills if row["kind"] in {"rank", "launcher"}),
            default=0,
        ),
    }


def _kill_at(moment: Moment, case: Case, command: Command, out_dir: Path) -> float:
    """Wait for the moment and kill; return when, or 0 if the command ended before."""
    first = newest_step(out_dir) + 1
    goal = first + int(moment.share * max(1, case.steps - 4 - first))
    if moment.waits_for == "start":
        time.sleep(moment.delay)
    elif not _wait_for_step(goal, command, out_dir):
        return 0.0
    pids = _doomed(moment, case, command)  # takes a while, so before what follows
    if moment.waits_for == "save":
        _wait_for_a_save(command, out_dir / "checkpoints")
    if moment.waits_for != "start":
        time.sleep(moment.delay)
    if not command.is_running:
        return 0.0
    for pid in pids:
        kill(pid)
    if case.kind == "job":
        for pid in command.processes():  # what the ranks have started, and ranks that came since
            kill(pid)
    return time.monotonic()


def _doomed(moment: Moment, case: Case, command: Command) -> list[int]:
    """Return the processes that are to be killed."""
    if case.kind == "rank":
        while command.is_running and moment.rank not in command.ranks():
            time.sleep(0.05)
        return [pid for rank, pid in command.ranks().items() if rank == moment.rank]
    ranks = command.ranks().values() if case.kind == "job" else ()
    return [command.process.pid, *ranks]


def _wait_for_step(goal: int, command: Command, out_dir: Path) -> bool:
    """Wait for a checkpoint; look often once there are steps, as they take a few milliseconds."""
    first = newest_step(out_dir)
    while command.is_running:
        newest = newest_step(out_dir)
        if newest >= goal:
            return True
        time.sleep(0.05 if newest == first else 0.005)
    return False


def _wait_for_a_save(command: Command, checkpoints: Path) -> None:
    """Wait until something is being written beside the checkpoints."""
    while command.is_running:
        with os.scandir(checkpoints) as entries:
            if any(entry.name.startswith(".rwkv-train-new-") for entry in entries):
                return
        time.sleep(0.0003)


def _problems_of_the_start(ended: Ended, before: Left) -> list[str]:
    """Compare where a start went on with the checkpoint that it had to find."""
    found = [int(number) for number in _GOING_ON.findall(ended.log)]
    if found and found != [before.newest]:
        return [f"it went on from step {found}, not from {before.newest}"]
    if "passed over" in ended.log:
        return ["a checkpoint was damaged"]
    if ended.code == 0 and before.newest is not None and not found:
        return [f"it did not go on from step {before.newest}"]
    return []


def _problems_of_the_end(case: Case, moment: Moment, ended: Ended, left_behind: list[int]) -> list[str]:
    problems = [f"processes {left_behind} were left"] if left_behind else []
    if ended.has_traceback:
        problems.append("there is a traceback")
    if case.kind != "rank":
        return problems + ([f"exit code {ended.code}"] if ended.code != -signal.SIGKILL else [])
    if ended.code != 75:
        problems.append(f"exit code {ended.code}, not 75")
    if len(ended.errors) < 1 or not all(f"rank {moment.rank} " in line for line in ended.errors):
        problems.append(f"rank {moment.rank} is not what the errors name: {ended.errors}")
    return problems


def _problems_of_the_folder(left: Left, expected: Left) -> list[str]:
    problems = [f"half written: {text}" for text in left.broken]
    for step, files in left.whole.items():
        if files != expected.whole.get(step):
            problems.append(f"the checkpoint of step {step} is not that of the undisturbed run")
    return problems


def _problems_of_the_result(run: SmallRun, reference: SmallRun, steps: int) -> list[str]:
    left = look(run.out_dir)
    problems = [f"left over: {name}" for name in left.temporary] + left.broken
    name = f"checkpoints/step-{steps:08d}"
    one, other = (load_training_checkpoint(each.out_dir / name) for each in (reference, run))
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        wanted, found = getattr(one, kind), getattr(other, kind)
        if wanted.keys() != found.keys() or not all(torch.equal(wanted[key], found[key]) for key in wanted):
            problems.append(f"{kind} differ from those of the undisturbed run")
    return problems
