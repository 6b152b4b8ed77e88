"""Small runs of the real command, each in a folder of its own: start them, find their processes, see what they left.

What lies in a run's folder is read here with ``json`` and ``hashlib`` alone, so that the code under trial is not its
own judge. Processes are found by a mark in their environment (``/proc``), which whatever they start inherits.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rwkv_train.data.prepare import prepare_data
from rwkv_train.tokenizers import load_tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
MARK = "RWKV_TRAIN_CAMPAIGN"
PATIENCE_SECONDS = 240.0
"""What a run may take that nobody disturbs; beyond it, it hangs."""
_UNFINISHED = (".rwkv-train-", ".unfinished")
_WORDS = ("state", "decay", "value", "key", "mixes", "reads", "writes", "every", "token", "head")


def make_corpus(folder: Path) -> Path:
    """Prepare a training and a validation corpus of a few thousand bytes in the folder, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n_documents in (("train", 12), ("valid", 4)):
        if (folder / f"{split}.idx").exists():
            continue
        texts = [
            " ".join(f"{_WORDS[i % 10]} {_WORDS[i * i % 7]} {i % 13}." for i in range(40 * n, 40 * n + 40))
            for n in range(n_documents)
        ]
        path = folder / f"{split}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        prepare_data([path], load_tokenizer("bytes"), folder / split)
    return folder


def settings_of(corpus: Path, out_dir: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that takes a second, with a checkpoint after every step.

    Args:
        corpus: where ``make_corpus`` made it.
        out_dir: folder of the run.
        changes: other values, by dotted name: ``{"trainer.devices": 2}``.
    """
    tree: dict[str, Any] = {
        "model": {
            "arch": "rwkv7",
            "n_layer": 2,
            "n_embd": 32,
            "head_size": 16,
            "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8},
            "vocab_size": 257,
            "ctx_len": 16,
        },
        "data": {"train": str(corpus / "train"), "valid": str(corpus / "valid"), "tokenizer": "bytes"},
        "optim": {"lr": 3e-3, "lr_final": 3e-4, "warmup_steps": 2},
        "trainer": {
            "out_dir": str(out_dir),
            "max_steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "accelerator": "cpu",
            "log_every_n_steps": 5,
            "val_tokens": 200,
            "sample_tokens": 0,
        },
        "checkpoint": {"every_n_steps": 1, "keep_last": 2},
    }
    for name, value in changes.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    log: str
    """Both of its streams."""
    seconds: float
    """Since its start."""

    @property
    def errors(self) -> list[str]:
        """The lines that say why it ended."""
        return [line for line in self.log.splitlines() if line.startswith("error:")]

    @property
    def has_traceback(self) -> bool:
        """Whether it ended as a mistake of ours does."""
        return "Traceback (most recent call last)" in self.log


class Command:
    """A command that runs, or has run.

    Args:
        line: the command line.
        log: file for both of its streams.
        environment: variables besides those of this process.
    """

    def __init__(self, line: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        # One thread a process: as many as there are cores would not be the same on every machine.
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment, MARK: self.mark}
        self.started = time.monotonic()
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                line, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=surroundings
            )

    @property
    def is_running(self) -> bool:
        """Whether the process that was started runs; those that it has started may outlive it."""
        return self.process.poll() is None

    def wait(self, seconds: float = PATIENCE_SECONDS) -> Ended:
        """Return how it ended; one that takes longer is ended with all it has started, and its code is -9."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
        return Ended(
            self.process.returncode,
            self.log.read_text(encoding="utf-8", errors="replace"),
            round(time.monotonic() - self.started, 2),
        )

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environments of this command's processes, by process id; its own is among them."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                environment = _environment_of(folder)
                if environment.get(MARK) == self.mark:
                    found[int(folder.name)] = environment
        return found

    def ranks(self) -> dict[int, int]:
        """Return the process id of each rank that our launcher has started."""
        return {
            int(environment["RANK"]): pid
            for pid, environment in self.processes().items()
            if "RANK" in environment and _parent_of(pid) == self.process.pid
        }

    def send_to_all(self, number: int) -> None:
        """Send a signal to the process and to all that it has started."""
        for pid in self.processes():
            kill(pid, number)

    def kill_all(self) -> None:
        """Kill the process and all that it has started."""
        if self.is_running:
            self.process.kill()
        while self.processes():
            self.send_to_all(signal.SIGKILL)
            self.process.poll()
        self.process.wait()

    def outlived_by(self, seconds: float) -> list[int]:
        """Return the processes that are still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return sorted(left)


class SmallRun:
    """A run of ``cli.py pretrain`` in a folder of its own, started as often as one likes.

    Args:
        folder: for settings and logs; it is made.
        corpus: where ``make_corpus`` made it.
        changes: settings, as in ``settings_of``.
        out_dir: folder of the run; ``None``: in ``folder``.
    """

    def __init__(
        self, folder: Path, corpus: Path, changes: Mapping[str, Any], *, out_dir: Path | None = None
    ) -> None:
        self.folder = folder
        self.out_dir = out_dir or folder / "run"
        self.commands: list[Command] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = folder / "settings.yaml"
        self._settings.write_text(yaml.safe_dump(settings_of(corpus, self.out_dir, changes)))

    def start(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        script: Path = CHECKOUT / "cli.py",
    ) -> Command:
        """Start the command.

        Args:
            *arguments: further arguments: ``"--set"``, ``"trainer.seed=1"``.
            environment: further variables.
            prefix: a command that starts this one.
            script: what to start instead of ``cli.py``.
        """
        line = [*prefix, sys.executable, str(script), "pretrain", "--config", str(self._settings), *arguments]
        log = self.folder / f"start-{len(self.commands) + 1}.log"
        self.commands.append(Command(line, log, environment or {}))
        return self.commands[-1]

    def kill_all(self) -> None:
        """Kill whatever any of the commands has left."""
        for command in self.commands:
            command.kill_all()


class Left(NamedTuple):
    """What lies in the folder of a run."""

    whole: dict[int, dict[str, str]]
    """Step -> name and SHA-256 of each of its files of tensors, for checkpoints that are whole."""
    broken: list[str]
    """What is wrong with others that have the name of a checkpoint."""
    temporary: list[str]
    """Names of what was being written, or removed."""

    @property
    def newest(self) -> int | None:
        """The highest step of a whole checkpoint."""
        return max(self.whole, default=None)


def look(out_dir: Path) -> Left:
    """Read every checkpoint of a run whole, and compare it with its hashes; nothing may be writing it."""
    left = Left({}, [], [])
    for path in sorted(out_dir.rglob("*")):
        if path.name.startswith(_UNFINISHED[0]) or path.name.endswith(_UNFINISHED[1]):
            left.temporary.append(path.name)
    for folder in sorted((out_dir / "checkpoints").glob("step-*")):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            found = {name: sha256(folder / name) for name in manifest["files"]}
        except (OSError, ValueError, KeyError) as error:
            left.broken.append(f"{folder.name}: {type(error).__name__} {error}")
            continue
        wrong = [name for name, value in found.items() if manifest["files"][name] != value]
        if wrong or manifest["step"] != int(folder.name.removeprefix("step-")):
            left.broken.append(f"{folder.name}: {', '.join(wrong) or 'another step'}")
        else:
            left.whole[manifest["step"]] = found
    return left


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def newest_step(out_dir: Path) -> int:
    """Return the highest step that a checkpoint is named after, whatever is in it; 0 where there is none."""
    try:
        names = os.listdir(out_dir / "checkpoints")  # noqa: PTH208 - asked for many times a second
    except FileNotFoundError:
        return 0
    return max((int(name[5:]) for name in names if name.startswith("step-")), default=0)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _environment_of(folder: Path) -> dict[str, str]:
    try:
        text = (folder / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
