"""Starts the processes of a run on one machine, passes signals on to them and ends them together.

Each child is the same command again, in torchrun's environment, so that a run looks the same inside whoever started
it. This process loads no torch: it starts, waits and says what happened.
"""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from types import FrameType

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError, LostProcessError
from rwkv_train.parallel.world import HOW_TO_START, LAUNCHER_PID, is_launched

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 20.0
"""What the others have to notice that a process has failed, and to say who; then they are asked to end."""
LAST_SECONDS = 10.0
"""From that request to SIGKILL."""
_ADDRESS = "127.0.0.1"
_PASSED_ON = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


def needs_launch(settings: TrainerConfig, environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether this command has to start the processes of the run itself.

    Args:
        settings: of the run.
        environment: that of this process unless given.

    Raises:
        ConfigError: the run is one of several machines and no launcher started this process.
    """
    if settings.world_size == 1 or is_launched(os.environ if environment is None else environment):
        return False
    if settings.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes is {settings.num_nodes}, and this process does not know its number among those of all "
            f"machines; {HOW_TO_START}"
        )
    return True


def launch(
    settings: TrainerConfig,
    argv: Sequence[str],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    last_seconds: float = LAST_SECONDS,
) -> int:
    """Run ``settings.devices`` copies of a command until all have ended.

    Args:
        settings: number of processes, grace time after a signal, limit of a hang.
        argv: the command line of this process, interpreter included, as in ``sys.orig_argv``.
        patience_seconds: what the others have to end by themselves when one has failed.
        last_seconds: from SIGTERM after that to SIGKILL.

    Returns:
        The exit code: 0, or that of the first process that failed; 128 + n after signal n.

    Raises:
        ConfigError: MASTER_PORT is set and in use.
        LostProcessError: a process was killed by a signal that did not come from here.
    """
    n_threads = max(1, _n_cores() // settings.devices)
    environment = _shared_environment(settings, n_threads)
    logger.info(
        "starting %d processes on this machine, OMP_NUM_THREADS=%s each, meeting at port %s",
        settings.devices,
        environment["OMP_NUM_THREADS"],
        environment["MASTER_PORT"],
    )
    inbox = _Inbox()
    inbox.open()
    family = _Family(settings, patience_seconds, last_seconds)
    try:
        for rank in range(settings.devices):
            family.start([sys.executable, *argv[1:]], environment | _ranks(rank))
        return family.wait(inbox)
    finally:
        family.kill()
        inbox.close()


class _Inbox:
    """Signals that have come and are not answered yet."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._previous = [(number, signal.getsignal(number)) for number in _PASSED_ON]

    def open(self) -> None:
        for number in _PASSED_ON:
            signal.signal(number, self._put)

    def close(self) -> None:
        for number, handler in self._previous:
            signal.signal(number, handler)

    def _put(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


class _Family:
    """The children, by rank, and what has become of them."""

    def __init__(self, settings: TrainerConfig, patience_seconds: float, last_seconds: float) -> None:
        self._grace_seconds = settings.grace_seconds
        self._hang_seconds = settings.hang_timeout_seconds
        self._patience_seconds = patience_seconds
        self._last_seconds = last_seconds
        self._children: list[subprocess.Popen[bytes]] = []
        self._passed_on: list[int] = []
        self._ended: dict[int, int] = {}
        """Exit codes of those that ended by themselves, in the order of their ends."""
        self._unwilling: list[int] = []
        """Ranks that did not end in time."""
        self._deadline: float | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # In a session of its own: the terminal's Ctrl-C comes to this process alone, which passes it on once.
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self._children.append(child)

    def wait(self, inbox: _Inbox) -> int:
        """Return the exit code when all have ended."""
        while len(self._ended) + len(self._unwilling) < len(self._children) or self._running():
            while inbox.numbers:
                number = inbox.numbers.pop(0)
                if number == signal.SIGINT and number in self._passed_on:
                    self.kill()
                    return 128 + number
                self._pass_on(number)
            self._look()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end_others()
            time.sleep(POLL_SECONDS)
        return self._exit_code()

    def kill(self) -> None:
        """End those that still run, with all that they have started, at once."""
        for child in self._running():
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [child for child in self._children if child.poll() is None]

    def _pass_on(self, number: int) -> None:
        if number in self._passed_on:
            return
        self._passed_on.append(number)
        for child in self._running():
            child.send_signal(number)
        self._give(self._grace_seconds + self._patience_seconds)

    def _give(self, seconds: float) -> None:
        """Set when the children have to be gone, unless they have to sooner."""
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _look(self) -> None:
        """Notice who has ended; the others then have not for ever."""
        new = {
            rank: child.returncode
            for rank, child in enumerate(self._children)
            if child.poll() is not None and rank not in self._ended and rank not in self._unwilling
        }
        # Of two ends between two looks, the one by a signal was not led to by the other.
        self._ended |= dict(sorted(new.items(), key=lambda item: item[1]))
        if new:
            all_is_well = all(code == 0 or self._is_as_asked(code) for code in new.values())
            self._give((self._hang_seconds if all_is_well else 0) + self._patience_seconds)

    def _end_others(self) -> None:
        if self._unwilling:
            self.kill()
            return
        self._unwilling = [rank for rank, child in enumerate(self._children) if child.poll() is None]
        for rank in self._unwilling:
            logger.warning("rank %d (process %d) does not end; ending it", rank, self._children[rank].pid)
            self._children[rank].terminate()
        self._deadline = time.monotonic() + self._last_seconds

    def _is_as_asked(self, code: int) -> bool:
        """Tell whether a process ended because of a signal that was passed on."""
        return code in {way for number in self._passed_on for way in (-number, 128 + number)}

    def _exit_code(self) -> int:
        failures = {rank: code for rank, code in self._ended.items() if code and not self._is_as_asked(code)}
        # A process that lost another one ends because of it, and may be the first.
        for rank, code in failures.items():
            if code < 0:
                raise LostProcessError(self._sentence(rank, -code))
            if code != LostProcessError.exit_code:
                return code
        if failures:
            return LostProcessError.exit_code
        if self._passed_on and (self._unwilling or any(self._ended.values())):
            return 128 + self._passed_on[0]
        if self._unwilling:
            raise LostProcessError(
                f"rank {self._unwilling[0]} (process {self._children[self._unwilling[0]].pid}) did not end though the "
                "others had, and was ended; the same command goes on from the last checkpoint"
            )
        return 0

    def _sentence(self, rank: int, number: int) -> str:
        hint = ", by the system if memory was short" if number == signal.SIGKILL else ""
        return (
            f"rank {rank} (process {self._children[rank].pid}) was killed by {signal.Signals(number).name}{hint}; the "
            "others have ended too, the same command goes on from the last checkpoint"
        )


def _shared_environment(settings: TrainerConfig, n_threads: int) -> dict[str, str]:
    """Torchrun's variables, those that are the same for all processes."""
    return {
        # Two processes with a thread for every core each are far slower than one; torchrun gives each one thread.
        "OMP_NUM_THREADS": str(n_threads),
        **os.environ,
        "MASTER_ADDR": _ADDRESS,
        "MASTER_PORT": str(_free_port(os.environ.get("MASTER_PORT"))),
        "WORLD_SIZE": str(settings.devices),
        "LOCAL_WORLD_SIZE": str(settings.devices),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": f"rwkv-train-{uuid.uuid4().hex[:8]}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        LAUNCHER_PID: str(os.getpid()),
    }


def _ranks(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_port(asked: str | None) -> int:
    """Return the port that was asked for, or one that nobody has."""
    if asked is not None and not (asked.isdigit() and 0 < int(asked) < 1 << 16):
        raise ConfigError(
            f"the environment variable MASTER_PORT is '{asked}', it must be a number below 65536"
        )
    port = int(asked or 0)
    try:
        # As torch's store will do: all addresses, and ports whose last connection is just closing.
        with socket.create_server(("", port), reuse_port=False) as server:
            found: int = server.getsockname()[1]
            return found
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigError(
            f"MASTER_PORT ({port}) is in use by another program or not allowed; set it to a free port, or unset it and "
            "one is chosen"
        ) from error
