"""Learned starts under what a run does to a model: parameters cast, blocks compiled and computed again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rwkv_train.config.load import check_tree
from rwkv_train.config.methods import PrefixMethod
from rwkv_train.finetuning.states import learn_prefix, learn_state
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.ops.context import packed_context
from rwkv_train.training.precision import prepare_forward

MODEL = {"arch": "rwkv7", "n_layer": 2, "n_embd": 32, "head_size": 8, "vocab_size": 50, "ctx_len": 24}
LEARN = {
    "state": learn_state,
    "prefix": lambda model: learn_prefix(model, PrefixMethod(method="prefix", n_tokens=5), None, seed=0),
}


def model_that_learns(method, **trainer):
    settings = {"out_dir": "run", "max_steps": 1, "accelerator": "cpu", **trainer}
    config = check_tree({"model": MODEL, "trainer": settings})
    model = build_model(config.model)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # many start at zero
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        LEARN[method](model)
        for parameter in model.start.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    prepare_forward(model, config.trainer)
    return model


def losses_and_gradients(model):
    tokens = torch.randint(50, (1, 48), generator=torch.Generator().manual_seed(3))
    found = []
    for bounds in ([0, 5, 5, 48], [0, 20, 47, 48]):
        context = packed_context(torch.tensor(bounds))
        found.append(model(tokens, targets=tokens.roll(-1, dims=1), context=context).losses)
        found[-1].mean().backward()
    return [*found, *(parameter.grad for parameter in model.start.parameters())]


@pytest.mark.parametrize("method", LEARN)
def test_compiled_and_recomputed_blocks_have_the_same_gradients(monkeypatch, method):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")  # a quarter of the time of "aot_eager"
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_function(f, backend=counter, **options)
    )
    trainer = {"compile": True, "grad_checkpointing": True}

    expected = losses_and_gradients(model_that_learns(method, precision="bf16-params"))
    found = losses_and_gradients(model_that_learns(method, precision="bf16-params", **trainer))

    for value, other in zip(found, expected, strict=True):  # bfloat16 keeps 8 bits
        assert (value - other).abs().amax() <= 0.03 * other.abs().amax()
    # The first block and the other one, for rows and for a prefix, which has another length.
    assert counter.frame_count == (2 if method == "state" else 4)


@pytest.mark.parametrize("method", LEARN)
def test_what_learns_gets_its_gradient_in_float32(method):
    model = model_that_learns(method, precision="bf16-params")
    losses_and_gradients(model)
    for parameter in model.start.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_a_learned_state_is_not_rounded_in_bfloat16():
    model = model_that_learns("state", precision="bf16-params")
    with torch.no_grad():
        for layer in model.start.layers:
            layer.wkv.fill_(1 + 2**-20)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[1]))

    model(torch.zeros(2, 3, dtype=torch.int64))

    assert torch.equal(seen[0].wkv, torch.full((2, 4, 8, 8), 1 + 2**-20))
    assert seen[0].time_mix_x.dtype == torch.bfloat16


def test_a_start_is_the_same_outside_of_the_forward():
    model = model_that_learns("prefix", precision="bf16-params")
    tokens = torch.arange(6).view(2, 3)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens, model.initial_state(2)).logits)
