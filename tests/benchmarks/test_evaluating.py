"""Measurements of evaluation: what the rows say, never how fast it was."""

import math

import pytest

from rwkv_train.benchmarks import evaluating
from rwkv_train.benchmarks.evaluating import bench_evaluating
from rwkv_train.config.model import Rwkv4Config, Rwkv7Config
from rwkv_train.errors import ConfigError
from rwkv_train.tokenizers import load_tokenizer

TEXTS = ["state and decay", "Grüße! " * 20, "x"]


def test_each_way_scores_the_same_texts_and_finds_the_same():
    pytest.importorskip("accelerate", reason="the harness' model `hf` needs accelerate")
    config = Rwkv4Config(n_layer=2, n_embd=32, vocab_size=257, ctx_len=512)
    rows = list(bench_evaluating(config, load_tokenizer("bytes"), TEXTS, batch_size=2))

    assert [row["by"] for row in rows] == ["eval-ppl", "lm_eval, rwkv-train", "lm_eval, transformers"]
    for row in rows:
        assert row["documents"] == 3
        assert row["tokens"] == sum(len(text.encode()) for text in TEXTS)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["ratio"] == pytest.approx(rows[2]["seconds"] / row["seconds"])
        assert row["bits_per_byte"] == pytest.approx(rows[0]["bits_per_byte"], rel=1e-5)
        assert 1 < row["bits_per_byte"] < 2 * math.log2(257)


def test_a_version_that_transformers_has_not_and_a_missing_package_are_refused(monkeypatch):
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(ConfigError, match="needs a model of rwkv4, which transformers has; not rwkv7"):
        list(bench_evaluating(Rwkv7Config(n_layer=1, n_embd=64, vocab_size=257), tokenizer, TEXTS))
    monkeypatch.setattr(evaluating, "NEEDS", ("lm_eval", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package: pip install 'lm-eval\[hf\]'"):
        list(bench_evaluating(Rwkv4Config(n_layer=1, n_embd=32, vocab_size=257), tokenizer, TEXTS))
