"""Campaign ``prepare``: preparations of data killed at random moments end with the files of an undisturbed one.

A case is a ``prepare-data`` of several inputs with two workers, shuffling, a search for near duplicates and a held-out
part, that is killed one to three times and then left to end. What is killed and when is a function of the number of
the case. After each kill any finished file that is there must be that of the undisturbed preparation, which one
process made.
"""

import gzip
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from tests.campaigns.record import AS_PROMISED, Row, outcome
from tests.campaigns.runs import CHECKOUT, Command, kill, sha256

KINDS = {
    "parent": "the command, whose workers then have to end by themselves",
    "job": "the command and its workers, all at once",
    "worker": "one worker, after which the command has to end with exit code 75 and say so, or be done",
}
LONGEST_DELAY = {"start": 3.0, "reading": 2.0, "choosing": 1.0, "moving": 0.01}
"""Seconds between what is waited for and the kill."""
MEGABYTES = 24
"""Text of all inputs."""
ENDS_WITHIN_SECONDS = 30.0
OPTIONS = ["--dedup", "minhash", "--valid-fraction", "0.1", "--max-leak", "0.3", "--shuffle", "7"]
NAMES = {
    f"out-{part}{ending}" for part in ("train", "valid") for ending in (".bin", ".idx", ".docs.npy", ".json")
}


class Moment(NamedTuple):
    """When something is killed."""

    waits_for: str
    """"start": nothing; "reading": the first tokens; "choosing": that all is read; "moving": that all is made."""
    delay: float
    """Seconds after that."""


class Case(NamedTuple):
    """A preparation and what is done to it."""

    seed: int
    kind: str
    moments: tuple[Moment, ...]


def cases() -> Iterator[Case]:
    """Give out the cases, for ever."""
    seed = 0
    while True:
        yield make_case(seed)
        seed += 1


def make_case(seed: int) -> Case:
    """Draw what is killed, and when."""
    chance = random.Random(seed)
    kind = chance.choices(("parent", "job", "worker"), (4, 4, 2))[0]
    moments = []
    for _ in range(chance.choice((1, 2, 3, 3))):
        waits_for = chance.choices(tuple(LONGEST_DELAY), (1, 5, 2, 2))[0]
        moments.append(Moment(waits_for, round(chance.uniform(0, LONGEST_DELAY[waits_for]), 4)))
    return Case(seed, kind, tuple(moments))


class PrepareTrial:
    """Runs cases.

    Args:
        work: folder for the inputs and the runs; those of cases that were as promised are removed.
        megabytes: text of all inputs.
        tokenizer: its name.
    """

    def __init__(self, work: Path, megabytes: float = MEGABYTES, tokenizer: str = "world") -> None:
        self._work = work
        self._tokenizer = tokenizer
        self._inputs = make_inputs(work / "inputs", megabytes)
        undisturbed = self._start(work / "undisturbed", 1)
        ended = undisturbed.wait()
        if ended.code:
            raise RuntimeError(f"the undisturbed preparation failed:\n{ended.log}")
        self._expected = finished_files(work / "undisturbed")

    def run(self, case: Case) -> Row:
        """Run a case; return its row."""
        started = time.monotonic()
        folder = self._work / f"case-{case.seed:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        problems: list[str] = []
        kills: list[Row] = []
        for moment in case.moments:
            command = self._start(folder, 2)
            try:
                was_killed = _kill_at(moment, case.kind, command, folder)
                ended = command.wait(ENDS_WITHIN_SECONDS if was_killed else 0.1)
                if left := command.outlived_by(ENDS_WITHIN_SECONDS):
                    problems.append(f"processes {left} were left")
            finally:
                command.kill_all()
            if "Traceback" in ended.log:
                problems.append("there is a traceback")
            if not was_killed:
                problems += [f"it ended with {ended.code} before it was killed"] if ended.code else []
                break
            promised = {75, 0} if case.kind == "worker" else {-signal.SIGKILL}
            if ended.code not in promised or (ended.code == 75 and "--workers" not in ended.log):
                problems.append(f"exit code {ended.code}: {ended.log[-300:]}")
            found = finished_files(folder)
            problems += [f"{name} is not that of the undisturbed one" for name in self._wrong(found)]
            kills.append({**moment._asdict(), "exit_code": ended.code, "finished_files": len(found)})
            if ended.code == 0 or _is_done(folder):  # a kill may come between its work and its end
                break
        problems += self._end(folder)
        if not problems:
            shutil.rmtree(folder)
        return {
            "seed": case.seed,
            "kind": case.kind,
            "kills": kills,
            "outcome": outcome(list(dict.fromkeys(problems))),
            "seconds": round(time.monotonic() - started, 1),
        }

    def _end(self, folder: Path) -> list[str]:
        """Let the preparation end, unless it is done, and compare all that is there."""
        if not _is_done(folder):
            ended = self._start(folder, 2).wait()
            if ended.code:
                return [f"the last start ended with exit code {ended.code}: {ended.log[-300:]}"]
        found = finished_files(folder)
        problems = [f"{name} is not that of the undisturbed one" for name in self._wrong(found)]
        problems += [f"{name} is missing" for name in sorted(NAMES - found.keys())]
        others = {path.name for path in folder.iterdir() if not path.name.endswith(".log")} - NAMES
        return problems + [f"left over: {name}" for name in sorted(others)]

    def _wrong(self, found: dict[str, str]) -> list[str]:
        return [name for name, value in found.items() if self._expected[name] != value]

    def _start(self, folder: Path, n_workers: int) -> Command:
        folder.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(CHECKOUT / "cli.py"), "prepare-data", "--tokenizer", self._tokenizer]
        for path in self._inputs:
            line += ["--input", str(path)]
        line += [*OPTIONS, "--output", str(folder / "out"), "--workers", str(n_workers)]
        log = folder / f"start-{len(list(folder.glob('*.log'))) + 1}.log"
        return Command(line, log, {})


def make_inputs(folder: Path, megabytes: float) -> list[Path]:
    """Write three inputs, of several domains and with duplicates, unless they are there."""
    paths = [folder / "one.jsonl.zst", folder / "two.jsonl", folder / "three.jsonl.gz"]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnoprstuvw", k=chance.randrange(2, 9))) for _ in range(4000)]
    compress: list[Callable[[bytes], bytes]] = [zstandard.ZstdCompressor().compress, bytes, gzip.compress]
    texts: list[str] = []
    for path, pack in zip(paths, compress, strict=True):
        lines, n_bytes = [], 0
        while n_bytes < megabytes * 1e6 / len(paths):
            text = " ".join(chance.choices(words, k=chance.randrange(20, 2000)))
            kind = chance.random()
            if texts and kind < 0.1:
                text = chance.choice(texts)
            elif texts and kind < 0.2:
                text = f"{chance.choice(texts)} {text[:50]}"
            texts.append(text)
            record = {"text": text, "meta": {"pile_set_name": f"domain {chance.randrange(5)}"}}
            lines.append(json.dumps(record).encode() + b"\n")
            n_bytes += len(lines[-1])
        path.write_bytes(pack(b"".join(lines)))
    return paths


def finished_files(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a finished corpus that is there, by its name."""
    return {name: sha256(folder / name) for name in sorted(NAMES) if (folder / name).exists()}


def totals(rows: list[Row]) -> Row:
    """Sum the cases up."""
    kills = [(row, one) for row in rows for one in row["kills"]]
    return {
        "runs": len(rows),
        "kills": len(kills),
        "kills_by_kind": dict(Counter(row["kind"] for row, _ in kills)),
        "kills_by_moment": dict(Counter(one["waits_for"] for _, one in kills)),
        "kills_among_the_moves": sum(0 < one["finished_files"] < len(NAMES) for _, one in kills),
        "as_promised": sum(row["outcome"] == AS_PROMISED for row in rows),
    }


def _is_done(folder: Path) -> bool:
    """Tell whether the files are in their places and nothing is left to do."""
    return (folder / "out-valid.idx").exists() and not (folder / "out.unfinished").exists()


def _kill_at(moment: Moment, kind: str, command: Command, folder: Path) -> bool:
    """Wait for the moment and kill; return whether there was something to kill."""
    unfinished = folder / "out.unfinished"
    signs = {
        "start": lambda: True,
        "reading": lambda: _has_bytes(unfinished / "tokens"),
        "choosing": (unfinished / "making").exists,
        "moving": (unfinished / "making" / "valid.idx").exists,
    }
    while not signs[moment.waits_for]():
        if not command.is_running:
            return False
        time.sleep(0.002)
    time.sleep(moment.delay)
    doomed = [command.process.pid]
    if kind == "job":
        doomed = [command.process.pid, *_workers(command)]
    elif kind == "worker":
        while command.is_running and not (workers := _workers(command)):
            time.sleep(0.01)
        doomed = workers[:1] if command.is_running else []
    if not command.is_running or not doomed:
        return False
    for pid in doomed:
        kill(pid)
    return True


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _workers(command: Command) -> list[int]:
    found = []
    for pid in command.processes():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"spawn_main" in line:
            found.append(pid)
    return sorted(found)
