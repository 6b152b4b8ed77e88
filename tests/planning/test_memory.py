"""The memory of a step, against real forwards and formulas by hand."""

import pytest
import torch

from rwkv_train.config.load import check_finetune_tree, check_tree
from rwkv_train.finetuning.method import apply_method
from rwkv_train.finetuning.quantized import quantize_linears
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.planning.memory import estimate_memory
from rwkv_train.training.precision import autocast_of, prepare_forward

B, T, C, V, L = 3, 24, 32, 50, 2
RWKV4 = {"arch": "rwkv4", "n_layer": L, "n_embd": C, "vocab_size": V, "ctx_len": T}
RWKV7 = {**RWKV4, "arch": "rwkv7", "head_size": 16, "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8}}
RWKV6 = {**RWKV4, "arch": "rwkv6", "head_size": 16, "lora_ranks": {"shift": 4, "decay": 8}}
RWKV5 = {**RWKV4, "arch": "rwkv5", "head_size": 16}
EACH = pytest.mark.parametrize(
    "section", [RWKV4, RWKV5, RWKV6, RWKV7], ids=["rwkv4", "rwkv5", "rwkv6", "rwkv7"]
)
N_RWKV4 = 2 * V * C + 13 * C * C * L + C * (11 * L + 4)
"""30,656 parameters, a multiple of 4."""


def backward_of_head(precision="fp32", words=V):
    """Its gradients, that of the logits, and their softmax, of which bfloat16 needs a copy; all in one chunk."""
    if precision == "fp32":
        return 4 * (words * C + B * T * C) + 4 * B * T * words + 4 * B * T * words
    copy = 2 * words * C if precision == "bf16-autocast" else 0  # of the weight
    return 4 * words * C + copy + 2 * B * T * C + 2 * B * T * words + 8 * B * T * words


def settings(model, **trainer):
    defaults = {"out_dir": "run", "max_steps": 1, "global_batch_size": 12, "micro_batch_size": B}
    return check_tree({"model": model, "trainer": {**defaults, "accelerator": "cpu", **trainer}})


def real_model(config):
    model = build_model(config.model, wkv_backend="cpp")
    initialize(model, seed=0)
    prepare_forward(model, config.trainer)
    return model


def bytes_kept(parameters, call, besides=()):
    """Memory of all tensors that autograd keeps of a real call, parameters apart, each counted once."""
    known = {tensor.data_ptr() for tensor in (*parameters, *besides)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output is not None
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16-params"])
@EACH
def test_the_estimate_is_what_a_real_step_keeps(section, precision):
    config = settings(section, precision=precision)
    model = real_model(config)
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    with autocast_of(precision, torch.device("cpu")):
        real = bytes_kept(model.parameters(), lambda: model(tokens, targets=tokens, with_penalty=True))
    assert estimate_memory(config, "cpp").activation_bytes == real + backward_of_head(precision)


@EACH
def test_the_pytorch_backend_is_counted_as_well(section):
    config = settings(section)
    model = build_model(config.model, wkv_backend="torch")
    initialize(model, seed=0)
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    real = bytes_kept(model.parameters(), lambda: model(tokens, targets=tokens, with_penalty=True))
    assert estimate_memory(config, "torch").activation_bytes == real + backward_of_head()


@pytest.mark.parametrize("precision", ["fp32", "bf16-params"])
@EACH
def test_the_cuda_backend_is_counted_without_a_gpu(section, precision):
    """It keeps what the C++ one does, and a state every 16 tokens instead of every 32."""
    config = settings(section, precision=precision)
    state = 3 * C if section["arch"] == "rwkv4" else C * 16
    more = L * 4 * state * (B * T // 16 - B * T // 32)
    estimate = estimate_memory(config, "cuda_exact").activation_bytes
    assert estimate == estimate_memory(config, "cpp").activation_bytes + more


@pytest.mark.parametrize("section", [RWKV5, RWKV6, RWKV7], ids=["rwkv5", "rwkv6", "rwkv7"])
def test_the_backend_on_tensor_cores_is_counted_with_states_in_bfloat16_every_64_tokens(section):
    config = settings(section)
    exact = L * 4 * C * 16 * (B * T // 16 + B)
    chunked = L * 2 * C * 16 * (B * T // 64 + B)
    estimate = estimate_memory(config, "cuda").activation_bytes
    assert estimate == estimate_memory(config, "cuda_exact").activation_bytes + chunked - exact


def bytes_of_block_inputs(section):
    """The stream into each block and its state; in RWKV-7 also the first layer's values."""
    stream = 4 * B * T * C
    if section["arch"] == "rwkv4":
        return L * (stream + 4 * B * (2 * C + 3 * C))
    values = stream if section["arch"] == "rwkv7" else 0
    return L * (stream + 4 * B * (2 * C + C * 16)) + values


@EACH
def test_recomputation_keeps_the_inputs_of_blocks_and_one_block(section):
    config = settings(section, grad_checkpointing=True)
    model = real_model(config)
    x, first = torch.randn(2, B, T, C, requires_grad=True)
    state = model.zero_state(B)
    # The second block: the first one of RWKV-7 has no mix with the first values, which costs memory.
    block, values = model.blocks[1], first if section["arch"] == "rwkv7" else None
    inputs = [x, first, *state[1]]
    one_block = bytes_kept(block.parameters(), lambda: block(x, state[1], values, PLAIN), inputs)

    estimate = estimate_memory(config, "cpp").activation_bytes

    others = bytes_kept(
        model.blocks[0].parameters(), lambda: model.blocks[0](x, state[0], None, PLAIN), inputs
    )
    assert estimate == bytes_of_block_inputs(section) + max(one_block, others)


@EACH
def test_under_recomputation_a_large_vocabulary_counts_more_than_a_block(section):
    words = 20_000
    config = settings({**section, "vocab_size": words}, grad_checkpointing=True)
    # ln_out: input, mean, deviation; head: input, place of the largest logit, but no logits; ids, here of both ends.
    rest = 4 * B * T * (C + 2) + 4 * B * T * C + 8 * B * T + 8 * B * T
    # The logits that are computed again are overwritten with their gradient.
    assert estimate_memory(config, "cpp").activation_bytes == (
        bytes_of_block_inputs(section) + rest + backward_of_head(words=words)
    )


def test_without_recomputation_logits_are_kept_up_to_a_bound():
    """32,768 rows of 65,536 in bfloat16 are 4 GiB; one more sample, and none are kept."""
    model = {**RWKV4, "vocab_size": 65_536, "ctx_len": 4096}
    trainer = {"precision": "bf16-autocast", "global_batch_size": 72}
    eight, nine = (
        estimate_memory(settings(model, micro_batch_size=n, **trainer), "cpp").activation_bytes
        for n in (8, 9)
    )
    assert eight > 2**32 > nine


METHODS = {
    "freeze": {"method": "freeze", "frozen_layers": 1},
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1},
    "dora": {"method": "lora", "rank": 4, "variant": "dora"},
    "miss": {"method": "lora", "rank": 4, "variant": "miss"},
    "quantized": {"method": "lora", "rank": 4, "quantize": "int8"},
    "state": {"method": "state"},
    "prefix": {"method": "prefix", "n_tokens": 3},
}


def apply(model, method):
    if getattr(method, "quantize", "none") != "none":
        quantize_linears(model, method.quantize, model.emb.weight.device)
    apply_method(model, method, lambda text: [1], seed=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16-params"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_estimate_is_what_a_real_step_of_finetuning_keeps(method, precision):
    """Packed rows: sequences of 10, 20, 30 and 12 tokens, each with a state."""
    trainer = {"out_dir": "run", "max_steps": 1, "global_batch_size": B, "micro_batch_size": B}
    config = check_finetune_tree(
        {
            "model": {**RWKV7, "init_from": "base.pth"},
            "data": {"datasets": [{"path": "builtin"}], "tokenizer": "bytes"},
            "finetune": method,
            "trainer": {**trainer, "accelerator": "cpu", "precision": precision},
        }
    )
    shapes, model = (
        build_model(config.model, wkv_backend="cpp", device=device) for device in ("meta", "cpu")
    )
    initialize(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # no row of zeros, whose length DoRA divides by
    apply(shapes, config.finetune)
    apply(model, config.finetune)
    prepare_forward(model, config.trainer)
    tokens = torch.randint(V, (1, B * T), generator=torch.Generator().manual_seed(0))
    context = packed_context(torch.tensor([0, 10, 30, 60, 72]))
    own = [*model.parameters(), *model.buffers()]

    real = bytes_kept(own, lambda: model(tokens, targets=tokens, context=context, with_penalty=True))

    backward = (
        backward_of_frozen_head(precision) if method["method"] != "freeze" else backward_of_head(precision)
    )
    assert estimate_memory(config, "cpp", shapes, 4).activation_bytes == real + backward


def backward_of_frozen_head(precision):
    """No gradient of the weight."""
    width = 4 if precision == "fp32" else 2
    widened = 0 if precision == "fp32" else 4  # logits are widened before their softmax
    return width * B * T * C + width * B * T * V + (4 + widened) * B * T * V


# Bytes for each parameter of a process among 4 (parameters + gradients + moments + masters).
@pytest.mark.parametrize(
    ("strategy", "precision", "offload", "on_device", "on_cpu"),
    [
        ("ddp", "fp32", "none", 4 + 4 + 4 + 8, 0),  # DDP sums copies of the gradients
        ("auto", "bf16-autocast", "none", 4 + 4 + 4 + 8, 0),
        ("ddp", "bf16-params", "none", 4 + 4 + 4 + 8, 0),  # the copies in bfloat16 are activations
        ("fsdp2", "fp32", "none", (4 + 4 + 8) / 4, 0),
        ("fsdp2", "bf16-params", "none", (4 + 4 + 8) / 4, 0),
        ("deepspeed_1", "fp32", "none", 4 + 4 + (8 + 4) / 4, 0),
        ("deepspeed_2", "fp32", "none", 4 + (4 + 8 + 4) / 4, 0),
        ("deepspeed_3", "fp32", "none", (4 + 4 + 8) / 4, 0),
        ("deepspeed_1", "bf16-params", "none", 2 + 4 + (8 + 4) / 4, 0),
        ("deepspeed_2", "bf16-params", "none", 2 + (4 + 8 + 4) / 4, 0),
        ("deepspeed_3", "bf16-params", "none", (2 + 4 + 8 + 4) / 4, 0),
        ("deepspeed_1", "fp32", "optimizer", 4 + 4, (8 + 4) / 4),
        ("deepspeed_2", "bf16-params", "optimizer", 2, (4 + 8 + 4) / 4),
        ("deepspeed_3", "fp32", "optimizer", 4 / 4, (4 + 8 + 4) / 4),
        ("deepspeed_3", "bf16-params", "optimizer_and_parameters", 0, (2 + 4 + 8 + 4) / 4),
    ],
)
def test_what_is_kept_of_the_model_is_shared_out_as_the_strategy_says(
    strategy, precision, offload, on_device, on_cpu
):
    config = settings(
        RWKV4, strategy=strategy, precision=precision, offload=offload, devices=4, micro_batch_size=1
    )
    estimate = estimate_memory(config, "cpp")
    assert estimate.model_bytes == on_device * N_RWKV4
    assert estimate.offloaded_bytes == on_cpu * N_RWKV4
    assert estimate.total_bytes == estimate.model_bytes + estimate.activation_bytes


def test_parameters_that_are_not_trained_have_neither_gradients_nor_moments():
    unused = C + 2 * C * 8  # v0, v1 and v2 of RWKV-7's first block
    model = build_model(settings(RWKV7).model)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert estimate_memory(settings(RWKV7), "cpp").model_bytes == 16 * n_parameters - 12 * unused


def test_activations_are_narrower_where_the_forward_sees_bfloat16():
    full, cast, zero = (
        estimate_memory(settings(RWKV7, **trainer), "cpp").activation_bytes
        for trainer in (
            {},
            {"precision": "bf16-params"},
            {"precision": "bf16-params", "strategy": "deepspeed_2"},
        )
    )
    # Under DeepSpeed the parameters are bfloat16; elsewhere autograd keeps copies of those that it needs.
    assert zero < cast < full
