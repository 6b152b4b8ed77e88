"""What a run comes to, against hand-made numbers."""

import pytest
import torch

from rwkv_train.config.load import check_tree
from rwkv_train.errors import BackendError
from rwkv_train.planning.plan import make_plan

RWKV4 = {"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 50, "ctx_len": 24}
RANKS = {"w": 8, "a": 8, "v": 8, "g": 8}
RWKV7 = {**RWKV4, "arch": "rwkv7", "head_size": 16, "lora_ranks": RANKS}


def settings(model, **trainer):
    defaults = {"out_dir": "run", "max_tokens": 10_000, "global_batch_size": 12, "micro_batch_size": 3}
    data = {"train": "nowhere/train", "valid": None}
    return check_tree(
        {"model": model, "data": data, "trainer": {**defaults, "accelerator": "cpu", **trainer}}
    )


def test_a_plan_counts_steps_and_tokens():
    plan = make_plan(settings(RWKV4))

    assert plan.tokens_per_step == 12 * 24
    assert plan.accumulation == 4
    assert plan.n_steps == 35  # 10,000 / 288 = 34.7
    # 2VC + 13C^2 L + C(11L + 4) for V = 50, C = 32, L = 2
    assert plan.n_parameters == 3_200 + 26_624 + 832


def test_a_missing_corpus_is_an_obstacle_and_no_end_of_the_plan():
    plan = make_plan(settings(RWKV4))
    assert plan.train_tokens is None
    assert "nowhere/train" in str(plan.obstacles[0])


def test_the_steps_of_epochs_are_not_known_without_the_corpus():
    plan = make_plan(settings(RWKV4, max_tokens=None, max_epochs=1.0))
    assert plan.n_steps is None
    assert "steps" not in dict(plan.rows())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_an_obstacle_and_no_end_of_the_plan():
    plan = make_plan(settings(RWKV7, accelerator="gpu"))
    assert "the run needs 1 GPUs (trainer.devices) but this machine has 0" in str(plan.obstacles[0])
    assert plan.device.type == "cuda"


def test_a_plan_says_what_lies_in_the_memory_of_the_cpu():
    zero = {"strategy": "deepspeed_2", "offload": "optimizer"}
    there, here = (dict(make_plan(settings(RWKV4, **more)).rows()) for more in (zero, {}))
    assert "in the CPU's" in there["memory a device (estimate)"]
    assert "in the CPU's" not in here["memory a device (estimate)"]


def test_a_file_for_deepspeed_that_a_run_would_refuse_is_an_obstacle():
    plan = make_plan(settings(RWKV4, strategy="deepspeed_2", deepspeed_config="nowhere.json"))
    assert "trainer.deepspeed_config (nowhere.json) cannot be read" in str(plan.obstacles[-1])


def test_a_backend_that_there_is_not_is_refused_by_the_name_of_the_setting():
    with pytest.raises(
        BackendError, match=r"^trainer\.wkv_backend: there is no backend 'foo'; choose one of"
    ):
        make_plan(settings(RWKV4, wkv_backend="foo"))
