"""What a run's choice of a backend depends on."""

import json

import pytest
import torch

from rwkv_train.config.load import check_tree
from rwkv_train.errors import BackendError
from rwkv_train.ops import backends
from rwkv_train.ops.chip import chip_name
from rwkv_train.ops.crossover import Chip
from rwkv_train.training.backend import choose_wkv_backend

CPU = torch.device("cpu")


def point(n_recurrences, n_tokens, **milliseconds):
    return {"recurrences": n_recurrences, "tokens": n_tokens, "ms": milliseconds}


@pytest.mark.parametrize(
    ("model", "head_size", "n_recurrences"),
    [
        ({}, 16, 8),
        ({"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 257, "ctx_len": 16}, None, 128),
    ],
    ids=["heads", "no heads"],
)
def test_measured_speeds_count_at_the_sizes_of_a_micro_batch(
    monkeypatch, tmp_path, tree, model, head_size, n_recurrences
):
    # 4 samples of 16 tokens, 2 heads of 16 or 32 channels. Only at that size "torch" is the faster one.
    others = [(n_recurrences // 2, 16), (2 * n_recurrences, 16), (n_recurrences, 8), (n_recurrences, 32)]
    case = {
        "head_size": head_size,
        "pass": "forward+backward",
        "backends": ["torch", "cpp"],
        "points": [
            point(n_recurrences, 16, torch=1.0, cpp=2.0),
            *(point(*sizes, torch=2.0, cpp=1.0) for sizes in others),
        ],
    }
    chip = Chip(chip_name(CPU), None)
    table = {
        "format": 2,
        "chip": chip.name,
        "capability": None,
        "measured": [
            {
                "op": "wkv4" if model else "wkv7",
                "dtype": "float32",
                "environment": {"rwkv_train": "0.1.0", "commit": None},
                "cases": [case],
            }
        ],
    }
    (tmp_path / "crossover").mkdir()
    (tmp_path / "crossover" / chip.file_name).write_text(json.dumps(table))
    monkeypatch.setenv("RWKV_TRAIN_KERNELS", str(tmp_path))
    # Without what this process chose before.
    monkeypatch.setattr(backends, "_resolve_auto", backends._resolve_auto.__wrapped__)

    config = check_tree(tree | ({"model": model} if model else {}))
    choice = choose_wkv_backend(config, CPU)
    assert choice.name == "torch"
    width = "B H" if head_size else "B C"
    assert f"torch 1 ms, cpp 2 ms; forward+backward at {width} = {n_recurrences}, T = 16 on " in choice.reason


def test_a_backend_that_cannot_run_is_refused_by_the_name_of_its_setting(tree):
    tree["trainer"]["wkv_backend"] = "cuda_exact"
    with pytest.raises(BackendError, match=r"trainer\.wkv_backend: the backend 'cuda_exact' cannot run"):
        choose_wkv_backend(check_tree(tree), CPU)
