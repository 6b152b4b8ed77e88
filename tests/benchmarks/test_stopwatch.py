"""Timing one call, and the roofs: what they measure, not how fast it is."""

from contextlib import nullcontext

import pytest
import torch

from rwkv_train.benchmarks import machine_limits, stopwatch
from rwkv_train.benchmarks.contenders import look_at
from rwkv_train.benchmarks.machine_limits import measure_limits
from rwkv_train.benchmarks.stopwatch import cache_bytes, cold_stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def small_caches(monkeypatch, tmp_path):
    for index, size in enumerate(("48K", "32K", "2048K", "1M")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(stopwatch, "_CPU_CACHES", tmp_path)


def test_the_largest_cache_counts(small_caches):
    assert cache_bytes(CPU) == 2 * 2**20


def test_a_cpu_that_does_not_tell_has_64_mebibytes(monkeypatch, tmp_path):
    monkeypatch.setattr(stopwatch, "_CPU_CACHES", tmp_path)
    assert cache_bytes(CPU) == 64 * 2**20


def test_a_call_is_made_once_and_takes_time(small_caches):
    calls = []
    assert cold_stopwatch(CPU)(lambda: calls.append(1)) > 0
    assert calls == [1]


def test_before_a_call_more_is_written_than_the_caches_hold(small_caches, monkeypatch):
    written = []
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, other: written.append(self.nbytes))
    watch = cold_stopwatch(CPU)
    watch(lambda: None)
    watch(lambda: None)
    assert len(written) == 2
    assert min(written) > 2 * 2**20


def test_limits_are_bytes_read_and_written_and_two_operations_a_product(small_caches, monkeypatch):
    monkeypatch.setitem(machine_limits.COPIED_BYTES, "cpu", 4 * 2**20)
    monkeypatch.setitem(machine_limits.MATRIX_WIDTH, "cpu", 100)
    limits = measure_limits(CPU, torch.float32, lambda call: call() is None or 0.5)
    assert limits.copy_bytes_per_second == 2 * 4 * 2**20 / 0.5
    assert limits.matmul_operations_per_second == 2 * 100**3 / 0.5


def test_a_gpu_is_kept_busy_until_the_call_is_handed_over(monkeypatch):
    stream = []

    class Event:
        """Reads the number of sweeps in the stream: each takes 0.25 ms."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.sweeps = stream.count("sweep")
            stream.append("event")

        def synchronize(self):
            stream.append("waited")

        def elapsed_time(self, end):
            return 0.25 * (end.sweeps - self.sweeps)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, other: stream.append("sweep"))
    watch = stopwatch._cuda_stopwatch(torch.zeros(3))
    stream.clear()
    assert watch(lambda: stream.extend(["sweep"] * 8)) == 2e-3
    # 3 ms of sweeps, then the call between two events, and only then a wait.
    assert stream == ["sweep"] * 12 + ["event"] + ["sweep"] * 8 + ["event", "waited"]


def test_memory_is_the_peak_of_a_call_beyond_what_was_taken_before(monkeypatch):
    taken = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: taken["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: taken.update(peak=taken["now"]))
    look = look_at(lambda: taken.update(peak=350), torch.device("cuda"))
    assert look.peak_bytes == 250
