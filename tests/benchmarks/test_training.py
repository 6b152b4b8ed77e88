import pytest
import torch

from rwkv_train.benchmarks.environment import describe_environment
from rwkv_train.benchmarks.training import Case, bench_training
from rwkv_train.config.model import Rwkv4Config

CASE = Case(Rwkv4Config(n_layer=1, n_embd=16, vocab_size=50, ctx_len=8), micro_batch_size=2)


def test_a_step_is_the_sum_of_its_parts():
    rows = bench_training(
        CASE, backends=["torch", "reference"], device=torch.device("cpu"), repeats=1, warmup=0
    )

    assert [row["backend"] for row in rows] == ["torch", "reference"]
    for row in rows:
        assert row["step_ms"] == pytest.approx(row["forward_ms"] + row["backward_ms"] + row["update_ms"])
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / (row["step_ms"] / 1000))
        assert row["tflops_6n"] * 1e12 == pytest.approx(6 * row["parameters"] * row["tokens_per_second"])


def test_a_backend_is_also_measured_with_compiled_blocks(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    rows = bench_training(
        CASE, backends=["torch"], device=torch.device("cpu"), compiles=True, repeats=1, warmup=1
    )
    assert [(row["backend"], row["compiled"]) for row in rows] == [("torch", False), ("torch", True)]
    assert len(compiled) == CASE.config.n_layer
    assert all(row["first_step_seconds"] > 0 for row in rows)


def test_the_environment_says_where_and_with_what():
    environment = describe_environment(torch.device("cpu"))

    assert environment["torch"] == torch.__version__
    assert environment["device"]
    assert environment["command"].startswith("rwkv-train")
