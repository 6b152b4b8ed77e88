"""``trainer.compile``: each block is one graph, of which a model has two, and learns what it learned before."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rwkv_train.config.load import check_tree
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.training.precision import prepare_forward
from rwkv_train.training.run import run_pretraining

# Unlike the recurrence, which stays whole, the other operations are rounded in another order: in float32, and in
# bfloat16, which keeps 8 bits, over the largest value.
TOLERANCE = {"fp32": 1e-5, "bf16-params": 0.03}
MODEL = {"n_layer": 3, "n_embd": 32, "vocab_size": 50, "ctx_len": 24}
MODELS = {
    "rwkv4": {},
    "rwkv5": {"head_size": 8},
    "rwkv6": {"head_size": 8, "lora_ranks": {"shift": 4, "decay": 6}},
    "rwkv7": {"head_size": 8, "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8}},
}


@pytest.fixture
def graphs(monkeypatch):
    """Counts what is compiled, to operations as they are."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_function(f, backend=counter, **options)
    )
    return counter


def losses_and_gradients(arch, tokens, contexts, **trainer):
    settings = {"out_dir": "run", "max_steps": 1, "accelerator": "cpu", **trainer}
    config = check_tree({"model": {"arch": arch, **MODEL, **MODELS[arch]}, "trainer": settings})
    model = build_model(config.model)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # many start at zero
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    prepare_forward(model, config.trainer)
    found = []
    for context in contexts:
        found.append(model(tokens, targets=tokens.roll(-1, dims=1), context=context).losses)
        found[-1].mean().backward()
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("arch", "precision", "recomputes", "is_packed"),
    [*((arch, "fp32", True, True) for arch in MODELS), ("rwkv7", "bf16-params", False, False)],
    ids=[*(f"{arch}-recomputed-packed" for arch in MODELS), "rwkv7-bf16-params"],
)
def test_compiled_blocks_have_the_same_losses_and_gradients(graphs, arch, precision, recomputes, is_packed):
    tokens = torch.randint(50, (1, 48) if is_packed else (2, 24), generator=torch.Generator().manual_seed(3))
    bounds = [[0, 5, 5, 48], [0, 20, 47, 48]] if is_packed else []
    contexts = [packed_context(torch.tensor(bound)) for bound in bounds] or [PLAIN]
    trainer = {"precision": precision, "grad_checkpointing": recomputes}

    expected = losses_and_gradients(arch, tokens, contexts, **trainer)
    found = losses_and_gradients(arch, tokens, contexts, compile=True, **trainer)

    for value, other in zip(found, expected, strict=True):
        assert (value - other).abs().amax() <= TOLERANCE[precision] * other.abs().amax()
    # The first block, with its own norm, and one for all others, whatever the boundaries in a packed row.
    assert graphs.frame_count == 2


def test_a_run_compiles_what_it_trains_and_nothing_else(graphs, settings):
    """Validation and samples come in shapes of their own, and would use up what PyTorch compiles of a function."""
    run_pretraining(settings({"trainer.compile": True, "trainer.max_steps": 1}))
    assert graphs.frame_count == 2
