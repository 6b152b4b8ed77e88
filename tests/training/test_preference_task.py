"""Runs on pairs of answers, and the log-probabilities before the run that they are compared with."""

import json
import math
import shutil

import pytest
import torch

from rwkv_train.checkpoints import Weights, write_weights
from rwkv_train.config.load import check_finetune_tree, check_model
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.training.finetuning import run_finetuning
from rwkv_train.training.loggers import read_metrics

MODEL = {"arch": "rwkv7", "n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 257, "ctx_len": 128}
MODEL |= {"lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8}}
WORDS = ("state", "decay", "value", "key", "mixes", "reads")


@pytest.fixture
def make(tmp_path):
    """Make settings of a run of DPO on a few pairs, with some sections changed."""
    model = build_model(check_model(MODEL))
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    base = write_weights(
        tmp_path / "base.pth", Weights(model.config, dict(model.state_dict()), None, None), "pth"
    )
    pairs = [{"prompt": str(n), "chosen": WORDS[n % 6], "rejected": WORDS[(n + 2) % 6]} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    dataset = {"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}

    def settings(finetune=None, init_from=base, **trainer):
        return check_finetune_tree(
            {
                "model": {**MODEL, "init_from": str(init_from)},
                "data": {"datasets": [dataset], "valid_fraction": 0.25, "tokenizer": "bytes"},
                "optim": {"lr": 3e-3, "l2wrap": 0},
                "trainer": {
                    "out_dir": str(tmp_path / "run"),
                    "max_steps": 1,
                    "global_batch_size": 2,
                    "micro_batch_size": 2,
                    "accelerator": "cpu",
                    "log_every_n_steps": 1,
                    **trainer,
                },
                "finetune": finetune or {"method": "full"},
                "preference": {"loss": "dpo", "beta": 1.0},
            }
        )

    return settings


@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "deepspeed_1"])
def test_before_the_first_update_the_model_is_its_reference_in_every_precision(make, strategy):
    summary = run_finetuning(make(precision="bf16-params", strategy=strategy))
    first = next(row for row in read_metrics(summary.out_dir / "metrics.csv") if row["step"] == "1")
    # Rows are filled otherwise than when the reference was computed, so last bits may differ.
    assert float(first["reward_margin"]) == pytest.approx(0, abs=1e-4)
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-4)


def test_a_run_that_goes_on_has_the_same_pairs_held_out(make):
    run_finetuning(make())
    with pytest.raises(
        ConfigError, match=r"data.valid or trainer.val_tokens hold out other pairs than .*step-"
    ):
        run_finetuning(make(max_steps=2, val_tokens=1))


def test_a_reference_of_the_base_in_other_bits_is_refused(make):
    lora = {"method": "lora", "rank": 2}
    out_dir = run_finetuning(make({**lora, "quantize": "int8"})).out_dir
    shutil.rmtree(out_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        run_finetuning(make(lora))


def test_what_is_learned_beside_a_base_goes_on_where_the_base_has_moved(make, tmp_path):
    lora = {"method": "lora", "rank": 2}
    run_finetuning(make(lora))
    moved = (tmp_path / "base.pth").rename(tmp_path / "moved.pth")
    assert run_finetuning(make(lora, moved, max_steps=2)).completed_steps == 2


def test_a_whole_model_goes_on_with_the_name_of_its_base(make, tmp_path):
    run_finetuning(make())
    with pytest.raises(ConfigError, match=r"model.init_from is '.*other.pth' but '.*base.pth'"):
        run_finetuning(make(None, tmp_path / "other.pth", max_steps=2))
