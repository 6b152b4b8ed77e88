"""Measurements of conversions: what the rows say, never how fast it was."""

import sys

import pytest

from rwkv_train.benchmarks.converting import bench_converting
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.models.registry import count_parameters


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_way_is_measured_and_nothing_is_left(tmp_path):
    config = Rwkv7Config(n_layer=1, n_embd=64, vocab_size=1000)
    rows = list(bench_converting(config, folder=tmp_path))

    ways = [("pth to safetensors", "rwkv-train"), ("safetensors to pth", "rwkv-train")]
    assert [(row["what"], row["by"]) for row in rows] == [
        *ways,
        ("pth to safetensors", "torch.load + save_file"),
    ]
    for row in rows:
        assert row["gb"] == 2 * count_parameters(config) / 1e9
        assert row["largest_mb"] == 2 * 1000 * 64 / 1e6
        assert row["mb_per_s"] == pytest.approx(1000 * row["gb"] / row["seconds"])
        assert row["memory_mb"] > 50  # Python with PyTorch alone has more
    assert list(tmp_path.iterdir()) == []
