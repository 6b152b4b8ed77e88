"""Run the trials in processes of their own: one that dies takes nothing with it but its own result."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

Facts = dict[str, Any]

PATIENCE_SECONDS = 600.0
"""Longest time without a word. Building a kernel takes seconds, waiting for others who build it minutes."""

_PROGRAM = "import sys; sys.path[:] = {path!r}; from rwkv_train.planning.doctor.trials import main; main()"


def probe(
    say: Callable[[str], None],
    *,
    search_path: Sequence[str],
    python: str = sys.executable,
    patience_seconds: float = PATIENCE_SECONDS,
) -> dict[str, Facts]:
    """Try packages and backends; see :func:`rwkv_train.planning.doctor.trials.attempts` for their names.

    Args:
        say: gets what the build of a kernel says while it runs.
        search_path: where packages are looked for, as in ``sys.path``.
        python: the interpreter.
        patience_seconds: longest time without a word, after which a process is ended.

    Returns:
        What came of each attempt, in the order in which they were made. One that failed has a ``"problem"``; one
        that needs what failed is not made.
    """
    program = _PROGRAM.format(path=list(search_path))
    results: dict[str, Facts] = {}
    while True:
        n_before = len(results)
        done = {name: "problem" not in facts for name, facts in results.items()}
        command = [python, "-P", "-c", program, json.dumps(done)]
        with tempfile.TemporaryFile() as errors:
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
            ) as process:
                try:
                    begun, has_hung = _listen(process, results, say, patience_seconds)
                finally:
                    process.kill()
            ending = f"it did not end within {patience_seconds:.0f} seconds" if has_hung else None
            ending = ending or _ending(process.returncode, errors)
        if begun is not None:
            results[begun] = {"problem": ending}
        elif len(results) == n_before and process.returncode != 0:
            results["torch"] = {"problem": ending}  # not even the first attempt was made
        if len(results) == n_before or process.returncode == 0:
            return results


def _listen(
    process: "subprocess.Popen[str]",
    results: dict[str, Facts],
    say: Callable[[str], None],
    patience_seconds: float,
) -> tuple[str | None, bool]:
    """Fill in results; return the attempt that was begun and not ended, and whether the process hung."""
    begun: str | None = None
    hung = threading.Event()

    def give_up() -> None:
        hung.set()
        process.kill()

    assert process.stdout is not None
    timer = threading.Timer(patience_seconds, give_up)
    timer.start()
    try:
        for line in process.stdout:
            timer.cancel()
            told = json.loads(line)
            if "progress" in told:
                say(told["progress"])
            elif "begin" in told:
                begun = told["begin"]
            else:
                begun, results[told["end"]] = None, told["facts"]
            timer = threading.Timer(patience_seconds, give_up)
            timer.start()
        process.wait()
    finally:
        timer.cancel()
    return begun, hung.is_set()


def _ending(returncode: int, errors: IO[bytes]) -> str:
    """Say how a process ended that was to go on."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    if returncode < 0:
        return f"it ends the process by signal {-returncode} ({signal.Signals(-returncode).name})"
    last_words = f": {lines[-1][:400]}" if lines else ""
    return f"it ends the process with exit code {returncode}{last_words}"
