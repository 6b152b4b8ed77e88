"""What a run comes to, against the run itself and against hand-made numbers."""

import pytest
import torch

from rwkv_train.config.load import check_tree
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.planning.memory import estimate_memory
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


def bytes_kept_by_a_forward(model, tokens):
    """Memory of all tensors that autograd keeps of a real forward, parameters apart, each counted once."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens, targets=tokens)
    assert output.losses.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("section", [RWKV4, RWKV7], ids=["rwkv4", "rwkv7"])
def test_the_memory_estimate_is_what_a_real_step_keeps(section, backend):
    config = settings(section)
    model = build_model(config.model, wkv_backend=backend)
    initialize(model, seed=0)
    tokens = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(0))
    gradient_of_logits = 3 * 24 * 50 * 4

    estimate = estimate_memory(config, backend)

    assert estimate.activation_bytes == bytes_kept_by_a_forward(model, tokens) + gradient_of_logits
    # A weight, its gradient and two moments, four bytes each.
    assert estimate.model_bytes == 16 * sum(parameter.numel() for parameter in model.parameters())


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
