"""Dropout where the published trainer of RWKV-4 and RWKV-5 has it."""

import math

import pytest
import torch

from rwkv_train.config.model import Rwkv4Config, Rwkv5Config, Rwkv6Config
from rwkv_train.models.registry import build_model, initialize

P = 0.3
SIZES = {"n_layer": 2, "n_embd": 128, "vocab_size": 50}
CONFIG = Rwkv4Config(**SIZES)
DROPPING = CONFIG.model_copy(update={"dropout": P})
EACH = pytest.mark.parametrize("kind", [Rwkv4Config, Rwkv5Config, Rwkv6Config])
TOKENS = torch.randint(0, 50, (4, 64), generator=torch.Generator().manual_seed(0))


def model_of(config):
    """At its initial values, where both mixes of a block give zero: the stream is changed by dropout alone."""
    model = build_model(config)
    initialize(model, seed=1)
    return model


def seen_by(model, name):
    """The input of a module in one forward in training mode."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    model(TOKENS)
    handle.remove()
    return seen[0].detach()


def assert_dropped(after, before, n_times):
    """Zeros as many as ``n_times`` independent masks make, five standard deviations at most away; the rest scaled."""
    kept = (1 - P) ** n_times
    sigma = math.sqrt(kept * (1 - kept) / after.numel())
    assert abs((after != 0).double().mean().item() - kept) < 5 * sigma
    torch.testing.assert_close(after, torch.where(after != 0, before / kept, 0))


@EACH
def test_embeddings_are_dropped_before_the_first_norm(kind):
    torch.manual_seed(0)
    model = model_of(kind(**SIZES, dropout=P))
    assert_dropped(seen_by(model, "blocks.0.ln0"), model.emb(TOKENS).detach(), 1)


@EACH
def test_the_stream_is_dropped_after_each_mix_of_each_block(kind):
    torch.manual_seed(0)
    model = model_of(kind(**SIZES, dropout=P))
    stream = []
    model.blocks[0].ln0.register_forward_hook(lambda module, inputs, output: stream.append(output.detach()))
    assert_dropped(seen_by(model, "blocks.0.ln2"), stream[-1], 1)
    assert_dropped(seen_by(model, "blocks.1.ln1"), stream[-1], 2)
    assert_dropped(seen_by(model, "ln_out"), stream[-1], 4)


def test_nothing_is_dropped_in_evaluation():
    plain, dropping = model_of(CONFIG).eval(), model_of(DROPPING).eval()
    assert torch.equal(dropping(TOKENS).logits, plain(TOKENS).logits)


def test_the_masks_come_from_the_global_generator():
    model = model_of(DROPPING)
    logits = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        logits.append(model(TOKENS).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_without_dropout_no_random_number_is_drawn():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model_of(CONFIG)(TOKENS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("saved", "loaded"), [(CONFIG, DROPPING), (DROPPING, CONFIG)])
def test_weights_know_nothing_of_dropout(saved, loaded):
    model_of(loaded).load_state_dict(model_of(saved).state_dict(), strict=True)
