import pytest
import torch

from rwkv_train.benchmarks.head import WAYS, Size, bench_head


def test_every_way_has_the_same_gradients_and_some_time_and_memory():
    size = Size(n_rows=64, n_embd=4, vocab_size=20_000)  # all logits: 4.9 MiB
    rows = bench_head(size, device=torch.device("cpu"), dtype=torch.float32, repeats=1, warmup=0)

    assert [row["way"] for row in rows] == list(WAYS)
    assert rows[0]["difference"] == 0
    for row in rows:
        assert row["difference"] < 1e-5
        assert row["forward_ms"] > 0
        assert row["backward_ms"] > 0
        assert row["n_rows"] * row["vocab_size"] == 64 * 20_000
    if rows[0]["peak_mib"] is None:
        pytest.skip("needs a system that tells the peak of a process' memory")
    assert rows[0]["peak_mib"] > 4.9
