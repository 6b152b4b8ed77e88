"""Blocks that are computed again in the backward: the same numbers from less memory."""

import pytest
import torch

from rwkv_train.config.model import Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config

CONFIGS = {
    "rwkv4": Rwkv4Config(n_layer=3, n_embd=32, vocab_size=50),
    "rwkv4 with dropout": Rwkv4Config(n_layer=3, n_embd=32, vocab_size=50, dropout=0.2),
    "rwkv5": Rwkv5Config(n_layer=3, n_embd=32, head_size=8, vocab_size=50),
    "rwkv6 with dropout": Rwkv6Config(n_layer=3, n_embd=32, head_size=8, vocab_size=50, dropout=0.2),
    "rwkv7": Rwkv7Config(n_layer=3, n_embd=32, head_size=8, vocab_size=50),
}


@pytest.fixture(params=CONFIGS)
def model(request, perturbed_model):
    return perturbed_model(CONFIGS[request.param])


def losses_and_gradients(model, tokens, *, recompute, bfloat16=False):
    model.recompute_blocks = recompute
    model.zero_grad()
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = model(tokens, targets=tokens.roll(-1, dims=1)).losses
    losses.mean().backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "autocast"])
def test_losses_and_gradients_are_the_same_bit_for_bit(model, tokens, bfloat16):
    losses, gradients = losses_and_gradients(model, tokens, recompute=False, bfloat16=bfloat16)
    losses_again, gradients_again = losses_and_gradients(model, tokens, recompute=True, bfloat16=bfloat16)

    assert torch.equal(losses, losses_again)
    assert gradients.keys() == gradients_again.keys()
    assert not [name for name in gradients if not torch.equal(gradients[name], gradients_again[name])]


def test_random_numbers_after_the_backward_are_the_same(model, tokens):
    drawn = []
    for recompute in (False, True):
        losses_and_gradients(model, tokens, recompute=recompute)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_less_is_kept_for_the_backward(model, tokens):
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = []

    def count(tensor):
        if tensor.data_ptr() not in parameters:
            kept[-1] += tensor.numel()
        return tensor

    for recompute in (False, True):
        kept.append(0)
        model.recompute_blocks = recompute
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(tokens, targets=tokens)
    # A block keeps over ten tensors of the size of its input, and now only that.
    assert kept[1] < kept[0] / 3


def test_a_block_is_called_as_a_module_once_more_in_the_backward(model, tokens):
    # Strategies that shard weights gather them in hooks of the module.
    calls = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, inputs, index=index: calls.append(index))
    losses_and_gradients(model, tokens, recompute=True)
    assert calls == [0, 1, 2, 2, 1, 0]


def test_nothing_is_recomputed_where_no_gradient_is_wanted(model, tokens):
    model.recompute_blocks = True
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.delattr("rwkv_train.models.lm.checkpoint")
        assert model(tokens).logits.shape == (2, 12, 50)


def test_a_model_that_recomputes_compiles_as_one_graph(perturbed_model, tokens):
    model = perturbed_model(CONFIGS["rwkv7"], wkv_backend="reference")
    few = tokens[:, :3]  # each is traced by itself
    expected = model(few).logits
    model.recompute_blocks = True
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(few).logits, expected)
