"""Measurements of preparations: what the rows say, never how fast it was."""

import json
import sys

import pytest

from rwkv_train.benchmarks.preparing import bench_preparing


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_way_is_measured_on_the_same_text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "schön " * 50}) + "\n" for _ in range(100)))

    rows = list(bench_preparing(path, tokenizer="bytes", workers=(2,)))

    assert [(row["what"], row["workers"]) for row in rows] == [("tokenizer alone", 1), ("prepare-data", 2)]
    for row in rows:
        assert row["text_mb"] == 100 * 50 * len("schön ".encode()) / 1e6
        assert row["mb_per_s"] == pytest.approx(row["text_mb"] / row["seconds"])
    assert rows[0]["memory_mb"] is None
    assert rows[1]["memory_mb"] > 40  # three Pythons with numpy have more
