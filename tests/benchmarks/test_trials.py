"""Measurements of whole runs in processes of their own: what the rows say, never how fast it was."""

import sys

import pytest

from rwkv_train.benchmarks import strategies
from rwkv_train.benchmarks.saving import bench_saving
from rwkv_train.benchmarks.strategies import STANDARD_CPU, Case, Crew, StepTimer, bench_strategies
from rwkv_train.benchmarks.trial import main, run_trial, settings_of_trial, train
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.config.save import to_yaml
from rwkv_train.errors import TrainingError

TINY = Rwkv7Config(n_layer=1, n_embd=16, head_size=16, vocab_size=257, ctx_len=8)


def test_the_steps_of_a_run_are_measured(monkeypatch):
    # In this process: a trial in processes of its own is that of the checkpoint.
    monkeypatch.setattr(strategies, "run_trial", lambda module, config, n_threads: train(config, StepTimer))
    case = Case(TINY, batch_size=2)
    (row,) = bench_strategies(case, strategies=["auto"], crews=[Crew(1, 1)], repeats=2, rounds=1)

    assert row["repeats"] == 2
    assert row["step_ms"] >= row["min_ms"] > 0
    assert row["tokens_per_second"] == pytest.approx(2 * 8 / (row["step_ms"] / 1000))
    assert row["setup_s"] > 0
    assert row["peak_mib"] > 100  # Python with PyTorch alone has more


def test_each_strategy_and_crew_has_a_row(monkeypatch):
    asked = []

    def measure(module, config, n_threads):
        trainer = config.trainer
        asked.append((trainer.strategy, trainer.world_size, n_threads, trainer.micro_batch_size))
        return {"steps": [0.001 * len(asked)], "setup_seconds": 1.0, "peak_bytes": 2**20 * len(asked)}

    monkeypatch.setattr(strategies, "run_trial", measure)
    crews = [Crew(1, 2), Crew(2, 1)]
    rows = list(bench_strategies(Case(TINY, 2), strategies=["auto", "ddp"], crews=crews, rounds=2))

    # Two processes without a strategy are no measurement. The kinds take turns.
    assert asked == 2 * [("auto", 1, 2, 2), ("ddp", 1, 2, 2), ("ddp", 2, 1, 1)]
    assert [(row["strategy"], row["processes"]) for row in rows] == [("auto", 1), ("ddp", 1), ("ddp", 2)]
    assert [row["step_ms"] for row in rows] == pytest.approx([2.5, 3.5, 4.5])
    assert [row["peak_mib"] for row in rows] == [4, 5, 6]


def test_a_checkpoint_is_measured_both_ways_and_nothing_is_left(tmp_path, monkeypatch):
    # The trial is no part of a run that this process is part of.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    (row,) = bench_saving(TINY, strategies=["fsdp2"], repeats=2, folder=tmp_path)

    assert (row["strategy"], row["processes"]) == ("fsdp2", 2)
    # A float32 weight and two moments; names and JSON on top.
    assert 12 * row["parameters"] < 1e9 * row["gb"] < 12 * row["parameters"] + 100_000
    assert row["save_gb_per_s"] == pytest.approx(row["gb"] / row["save_s"])
    assert all(row[name] > 0 for name in ("write_s", "verify_s", "weights_s", "restore_s"))
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_a_trial_ends_with_the_code_and_the_sentence_of_its_error(tmp_path, monkeypatch, capsys):
    trainer = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "accelerator": "cpu"}
    (tmp_path / "settings.yaml").write_text(to_yaml(settings_of_trial(TINY, tmp_path, trainer)))
    (tmp_path / "corpus.bin").unlink()
    monkeypatch.setattr(sys, "argv", ["trial", str(tmp_path / "settings.yaml"), str(tmp_path / "found.json")])
    assert main(StepTimer) == 2
    assert "corpus.bin" in capsys.readouterr().err


def test_a_trial_that_fails_says_which_and_why(tmp_path):
    trainer = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "accelerator": "cpu"}
    config = settings_of_trial(TINY, tmp_path, trainer)
    with pytest.raises(TrainingError, match=r"'auto' with 1 processes ended with exit code 1: .*no\.such"):
        run_trial("no.such", config, n_threads=1)


def test_the_model_of_the_usual_case_can_be_shared_by_two_processes():
    assert STANDARD_CPU.batch_size % 2 == 0
