"""Measurements of whole runs in processes of their own: what the rows say, never how fast it was."""

import pytest

from rwkv_train.benchmarks.saving import bench_saving
from rwkv_train.benchmarks.strategies import STANDARD_CPU, Case, Crew, bench_strategies
from rwkv_train.benchmarks.trial import run_trial, settings_of_trial
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.errors import TrainingError

TINY = Rwkv7Config(n_layer=1, n_embd=16, head_size=16, vocab_size=257, ctx_len=8)


def test_each_strategy_and_crew_has_a_row(monkeypatch):
    # The trials are no part of a run that this process is part of.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    rows = [
        row
        for strategy, crews in (("auto", [Crew(1, 1), Crew(2, 1)]), ("ddp", [Crew(2, 1)]))
        for row in bench_strategies(
            Case(TINY, batch_size=2), strategies=[strategy], crews=crews, repeats=2, rounds=1
        )
    ]

    # Two processes without a strategy are no measurement.
    assert [(row["strategy"], row["processes"]) for row in rows] == [("auto", 1), ("ddp", 2)]
    for row in rows:
        assert row["repeats"] == 2
        assert row["step_ms"] >= row["min_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / (row["step_ms"] / 1000))
        assert row["setup_s"] > 0
        assert row["peak_mib"] > 100  # Python with PyTorch alone has more


def test_a_checkpoint_is_measured_both_ways_and_nothing_is_left(tmp_path):
    (row,) = bench_saving(TINY, strategies=["fsdp2"], repeats=2, folder=tmp_path)

    assert (row["strategy"], row["processes"]) == ("fsdp2", 2)
    # A float32 weight and two moments; names and JSON on top.
    assert 12 * row["parameters"] < 1e9 * row["gb"] < 12 * row["parameters"] + 100_000
    assert row["save_gb_per_s"] == pytest.approx(row["gb"] / row["save_s"])
    assert all(row[name] > 0 for name in ("write_s", "verify_s", "weights_s", "restore_s"))
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_fails_says_which_and_why(tmp_path):
    trainer = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "accelerator": "cpu"}
    config = settings_of_trial(TINY, tmp_path, trainer)
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(TrainingError, match=r"'auto' with 1 processes ended with exit code 2: .*corpus\.bin"):
        run_trial("rwkv_train.benchmarks.strategies", config, n_threads=1)


def test_the_model_of_the_usual_case_can_be_shared_by_two_processes():
    assert STANDARD_CPU.batch_size % 2 == 0
