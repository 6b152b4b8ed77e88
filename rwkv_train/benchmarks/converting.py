"""What a conversion costs: time and memory of its own, beside the few lines that people write themselves."""

import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_train.checkpoints import Weights, write_weights
from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import ConfigError, TrainingError

Json = dict[str, Any]

POLL_SECONDS = 0.02
"""Time between two looks at the memory of a process."""

_PLAIN = """
import sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], map_location="cpu", weights_only=True), sys.argv[2])
"""
"""What is compared with: no check of the file, no comparison of what was written."""

_CONVERT = [sys.executable, "-c", "from rwkv_train.commands import main; main()", "convert-checkpoint"]


def bench_converting(config: ModelConfig, *, repeats: int = 1, folder: Path | None = None) -> Iterator[Json]:
    """Measure conversions of random bfloat16 weights, each in a process of its own. Linux alone.

    Source and target are on one disk. What was just written may be read from the system's cache.

    Args:
        config: sizes of the model.
        repeats: conversions that are measured; the median time and the largest memory count.
        folder: where three copies of the weights are written and removed again; a temporary one unless given.

    Yields:
        One row for each way: ``what``, ``by``, ``gb`` of weights (10^9 bytes), ``seconds``, ``mb_per_s`` of weights,
        ``memory_mb``, the most anonymous memory (RssAnon) that the process had, and ``largest_mb``, its largest
        tensor.

    Raises:
        ConfigError: this system does not tell a process's anonymous memory.
        CheckpointError: the disk is too full.
        TrainingError: a conversion failed.
    """
    if not Path("/proc/self/status").is_file():
        raise ConfigError("bench converting reads a process's memory from /proc, which only Linux has")
    with tempfile.TemporaryDirectory(dir=folder, prefix="rwkv-train-bench-") as name:
        place = Path(name)
        source = _random_weights(config)
        pth = write_weights(place / "model.pth", Weights(config, source, None, None), "pth")
        largest = max(header.nbytes for header in source.headers.values())
        folder_of_ours, back, plain = place / "folder", place / "back.pth", place / "plain.safetensors"
        ways = {
            ("pth to safetensors", "rwkv-train"): [*_CONVERT, pth, folder_of_ours, "--to", "safetensors"],
            ("safetensors to pth", "rwkv-train"): [*_CONVERT, folder_of_ours, back, "--to", "pth"],
            ("pth to safetensors", "torch.load + save_file"): [sys.executable, "-c", _PLAIN, pth, plain],
        }
        for (what, by), command in ways.items():
            again = ["--overwrite"] if by == "rwkv-train" else []
            found = [_measure([*map(str, command), *again]) for _ in range(repeats)]
            seconds = statistics.median(one for one, _ in found)
            yield {
                "what": what,
                "by": by,
                "arch": config.arch,
                "L": config.n_layer,
                "C": config.n_embd,
                "repeats": repeats,
                "gb": source.n_bytes / 1e9,
                "seconds": seconds,
                "mb_per_s": source.n_bytes / 1e6 / seconds,
                "memory_mb": max(memory for _, memory in found) / 1e6,
                "largest_mb": largest / 1e6,
            }
            for written in (back, plain):
                written.unlink(missing_ok=True)


def _random_weights(config: ModelConfig) -> TensorSource:
    """Weights that take no memory until one is asked for."""
    shapes = expected_shapes(config)

    def make(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16)

    headers = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()
    }
    return TensorSource(headers, make)


def _measure(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and the most anonymous memory that it had, in bytes."""
    began = time.perf_counter()
    most = 0
    with (
        tempfile.TemporaryFile() as stderr,  # a pipe that nobody reads would fill up
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr) as process,
    ):
        while process.poll() is None:
            most = max(most, _anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise TrainingError(f"the conversion to be measured ended with {process.returncode}: {said[-300:]}")
    return seconds, most


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it has just ended
