"""How fast text becomes tokens on disk, beside the tokenizer alone, and what memory all processes take."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.benchmarks.converting import POLL_SECONDS
from rwkv_train.data.corpus import read_documents
from rwkv_train.errors import ConfigError, TrainingError
from rwkv_train.tokenizers import load_tokenizer

Json = dict[str, Any]

WORKERS = (1, 2)
"""Numbers of processes that are measured."""

_BATCH_CHARACTERS = 1 << 20
_PREPARE = [sys.executable, "-c", "from rwkv_train.commands import main; main()", "prepare-data"]


def bench_preparing(
    source: Path, *, tokenizer: str = "world", repeats: int = 1, workers: Sequence[int] = WORKERS
) -> Iterator[Json]:
    """Measure ``prepare-data`` as a command, and the tokenizer alone on the same texts in memory. Linux alone.

    Args:
        source: a file of text, which is likely to be in the system's cache.
        tokenizer: its name.
        repeats: the median time and the largest memory count.
        workers: numbers of processes.

    Yields:
        One row for each way: ``what``, ``workers``, ``text_mb`` (10^6 bytes of UTF-8), ``seconds`` (of a command from
        its start to its end), ``mb_per_s``, and ``memory_mb``, the most anonymous memory (RssAnon) that the command
        and all that it started had together; ``None`` for the tokenizer, whose process holds all texts.

    Raises:
        ConfigError: this system does not tell a process's anonymous memory.
        DataError: the file cannot be read.
        TrainingError: a command failed.
    """
    if not Path("/proc/self/status").is_file():
        raise ConfigError("bench preparing reads the processes' memory from /proc, which only Linux has")
    texts = [document.text for document in read_documents([source])]
    text_mb = sum(len(text.encode()) for text in texts) / 1e6
    alone = [_tokenize(tokenizer, texts) for _ in range(repeats)]
    yield _row("tokenizer alone", 1, text_mb, alone, None)
    del texts
    for n_workers in workers:
        found = [_prepare(source, tokenizer, n_workers) for _ in range(repeats)]
        memory = max(memory for _, memory in found) / 1e6
        yield _row("prepare-data", n_workers, text_mb, [seconds for seconds, _ in found], memory)


def _row(what: str, n_workers: int, text_mb: float, times: list[float], memory_mb: float | None) -> Json:
    seconds = statistics.median(times)
    return {
        "what": what,
        "workers": n_workers,
        "repeats": len(times),
        "text_mb": text_mb,
        "seconds": seconds,
        "mb_per_s": text_mb / seconds,
        "memory_mb": memory_mb,
    }


def _tokenize(name: str, texts: Sequence[str]) -> float:
    """Return the seconds for all texts, in batches as the command makes them; loading the vocabulary is not in it."""
    tokenizer = load_tokenizer(name)
    tokenizer.encode("the vocabulary is loaded now")
    began = time.perf_counter()
    batch: list[str] = []
    n_characters = 0
    for text in texts:
        batch.append(text)
        n_characters += len(text)
        if n_characters >= _BATCH_CHARACTERS:
            tokenizer.encode_arrays(batch)
            batch, n_characters = [], 0
    tokenizer.encode_arrays(batch)
    return time.perf_counter() - began


def _prepare(source: Path, tokenizer: str, n_workers: int) -> tuple[float, int]:
    """Run the command; return its seconds and the most anonymous memory of it and its workers, in bytes."""
    most = 0
    with (
        tempfile.TemporaryDirectory(prefix="rwkv-train-bench-") as folder,
        tempfile.TemporaryFile() as stderr,  # a pipe that nobody reads would fill up
    ):
        arguments = ["--input", str(source), "--tokenizer", tokenizer, "--output", f"{folder}/out"]
        command = [*_PREPARE, *arguments, "--workers", str(n_workers)]
        began = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        ) as process:
            while process.poll() is None:
                most = max(most, _anonymous_bytes(process.pid))
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - began
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise TrainingError(f"the command to be measured ended with {process.returncode}: {said[-300:]}")
    return seconds, most


def _anonymous_bytes(session: int) -> int:
    """Sum up the processes of a session."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            facts = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(facts[3]) != session:
                continue
            status = (folder / "status").read_text(encoding="utf-8")
        except OSError:  # it has just ended
            continue
        total += sum(
            int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")
        )
    return total
