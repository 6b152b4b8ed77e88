"""A quantized base: its weights are those of the formats, and what it computes is what they say."""

import copy
import sys

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rwkv_train.config.model import Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.finetuning.quantized import (
    QuantizedLinear,
    load_quantized,
    quantize_linears,
    require_bitsandbytes,
)
from rwkv_train.models.registry import build_model

KINDS = ["int8", "nf4"]
CONFIGS = [
    Rwkv4Config(n_layer=2, n_embd=64, vocab_size=40),
    Rwkv5Config(n_layer=2, n_embd=64, head_size=16, vocab_size=40, ffn_width=192),
    Rwkv6Config(n_layer=2, n_embd=64, head_size=16, vocab_size=40, ffn_width=192),
    Rwkv7Config(n_layer=2, n_embd=64, head_size=16, vocab_size=40),
]
TARGETS = r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|output)"
PUBLISHED_NF4 = np.array(
    # Dettmers et al. 2023, "QLoRA", appendix E.
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def random_weight(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


def make_model(config, seed=0):
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.requires_grad_(False)


def with_weights_of(quantized, model):
    """A copy of the model that computes with the weights which the quantized one stands for, as ordinary layers."""
    plain = copy.deepcopy(model)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.dequantize()
    return plain


def make_pair(config, kind):
    model = make_model(config)
    quantized = copy.deepcopy(model)
    quantize_linears(quantized, kind, "cpu")
    return quantized, with_weights_of(quantized, model)


@pytest.fixture
def tokens():
    return torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


# ---- the formats


def test_int8_is_off_by_half_a_step_of_each_row_at_most():
    weight = random_weight(32, 80)
    error = (QuantizedLinear(weight, "int8").dequantize() - weight).abs().double()

    step = weight.abs().amax(dim=1, keepdim=True).double() / 127
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert (error > step / 4).float().mean() == pytest.approx(0.5, abs=0.1)  # and no finer


def test_nf4_takes_the_nearest_of_the_published_values_in_blocks_of_64():
    weight = random_weight(32, 192)

    blocks = weight.double().numpy().reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / largest)[..., None] - PUBLISHED_NF4).argmin(axis=-1)
    expected = (PUBLISHED_NF4[nearest] * largest).reshape(weight.shape)

    found = QuantizedLinear(weight, "nf4").dequantize()
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    weight = random_weight(4, 128)
    weight[1] = 0
    weight[2, :64] = 0
    found = QuantizedLinear(weight, kind).dequantize()
    assert not found[1].any()
    assert not found[2, :64].any()
    assert found.isfinite().all()


@pytest.mark.parametrize(("kind", "part"), [("int8", 0.26), ("nf4", 0.142)])
def test_a_layer_takes_the_bytes_of_its_format(kind, part):
    # 1 byte and a scale of 4 bytes in 1,024; half a byte and a scale of 4 bytes in 64: 0.251 and 0.1406 of 4 bytes.
    layer = QuantizedLinear(random_weight(256, 1024), kind)
    n_bytes = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert n_bytes < part * 4 * 256 * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_give_the_same_codes(kind):
    first, second = (QuantizedLinear(random_weight(64, 256), kind) for _ in range(2))
    assert torch.equal(first.qweight, second.qweight)
    assert torch.equal(first.scales, second.scales)


# ---- the layer


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_input_equals_finite_differences(kind):
    layer = QuantizedLinear(random_weight(5, 64), kind)
    x = random_weight(3, 64, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_computes_as_a_linear_layer_does(kind):
    layer = QuantizedLinear(random_weight(32, 64), kind)
    plain = nn.Linear(64, 32, bias=False)
    plain.weight.data = layer.dequantize()
    x = random_weight(6, 64, seed=1).requires_grad_()
    results = []
    for each in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        results.append((y, gradient))
    (y, gradient), (expected, expected_gradient) = results
    assert y.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_of_the_model_leaves_the_weights_as_they_are(kind):
    layer = QuantizedLinear(random_weight(32, 64), kind)
    before = layer.dequantize()
    layer.to(torch.bfloat16).double()
    assert torch.equal(layer.dequantize(), before)


def test_the_operator_is_registered_as_pytorch_wants_it():
    layer = QuantizedLinear(random_weight(8, 64), "int8")
    x = random_weight(2, 64, seed=1).requires_grad_()
    for transposed, given in ((False, x), (True, random_weight(2, 8, seed=1).requires_grad_())):
        torch.library.opcheck(
            torch.ops.rwkv_train.quantized_linear.default,
            (given, layer.qweight, layer.scales, "int8", transposed),
        )


# ---- the model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.arch)
def test_logits_and_the_gradient_of_states_are_those_of_the_dequantized_weights(config, kind, tokens):
    quantized, plain = make_pair(config, kind)
    earlier = plain(tokens.flip(1)).state  # RWKV-4's empty state has no gradient
    results = []
    for model in (quantized, plain):
        state = tuple(layer._replace(wkv=layer.wkv.clone().requires_grad_()) for layer in earlier)
        logits = model(tokens, state).logits
        wanted = [layer.wkv for layer in state]
        results.append((logits, torch.autograd.grad(logits.square().mean(), wanted)))
    (logits, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_adapter_are_those_of_the_dequantized_weights(kind, recompute, tokens):
    results = []
    for model in make_pair(CONFIGS[-1], kind):
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=TARGETS), model)
        generator = torch.Generator().manual_seed(2)
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in learned.values():
                parameter.normal_(std=0.2, generator=generator)
        model.recompute_blocks = recompute
        losses = model(tokens, targets=tokens.roll(-1, dims=1)).losses
        gradients = torch.autograd.grad(losses.mean(), list(learned.values()))
        results.append((losses, dict(zip(learned, gradients, strict=True))))
    (losses, gradients), (expected, expected_gradients) = results
    assert len(gradients) == 2 * 2 * 6  # two matrices, two blocks, six layers
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_after_an_evaluation_is_that_before_it(kind, tokens):
    model, _ = make_pair(CONFIGS[-1], kind)

    def gradient():
        state = model.zero_state(len(tokens))
        state = (state[0]._replace(wkv=state[0].wkv.requires_grad_()), *state[1:])
        return torch.autograd.grad(model(tokens, state).logits.square().mean(), state[0].wkv)[0]

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(tokens)
    model.train()
    assert torch.equal(gradient(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_layer_gives_the_same_bits(kind):
    layer = QuantizedLinear(random_weight(64, 64), kind)
    x = random_weight(6, 64, seed=1).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_the_blocks_is_replaced_and_counted(kind):
    model = make_model(CONFIGS[-1])
    summary = quantize_linears(model, kind, "cpu")
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert all(isinstance(part, QuantizedLinear) for part in linears)
    assert summary.n_layers == len(linears) == 12
    assert summary.n_weights == 2 * (4 * 64 * 64 + 2 * 64 * 256)
    assert summary.n_bytes == sum(buffer.nbytes for buffer in model.buffers())
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    assert not any(name.endswith(("qweight", "scales")) for name in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_quantized_as_they_are_read_are_those_quantized_later(kind, tokens):
    later = make_model(CONFIGS[-1])
    tensors = {name: tensor.bfloat16() for name, tensor in later.state_dict().items()}
    later.load_state_dict(tensors)
    at_once = build_model(CONFIGS[-1], device="meta")
    summary = load_quantized(at_once, tensors, kind, "cpu")
    assert quantize_linears(later, kind, "cpu") == summary
    assert torch.equal(at_once(tokens).logits, later(tokens).logits)
    assert at_once(tokens).logits.dtype == torch.float32


# ---- what is refused


def test_a_layer_that_blocks_of_64_do_not_fill_is_refused_by_name_and_nothing_changes():
    model = make_model(Rwkv7Config(n_layer=1, n_embd=32, head_size=16, vocab_size=40))
    with pytest.raises(
        ConfigError, match=r"multiple of 64 inputs, blocks\.0\.att\.receptance has 32; set it"
    ):
        quantize_linears(model, "nf4", "cpu")
    assert not any(isinstance(part, QuantizedLinear) for part in model.modules())
    assert quantize_linears(model, "int8", "cpu").n_layers == 6


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused_by_name(kind):
    model = make_model(CONFIGS[-1])
    model.get_parameter("blocks.1.ffn.key.weight").data[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.key\.weight holds infinities or NaN"):
        quantize_linears(model, kind, "cpu")


def test_a_model_is_not_quantized_twice():
    model = make_model(CONFIGS[-1])
    quantize_linears(model, "int8", "cpu")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_linears(model, "nf4", "cpu")


def test_without_bitsandbytes_nf4_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'rwkv-train\[quantize\]'"):
        require_bitsandbytes()
    with pytest.raises(ConfigError, match="bitsandbytes"):
        quantize_linears(make_model(CONFIGS[-1]), "nf4", "cpu")
    assert quantize_linears(make_model(CONFIGS[-1]), "int8", "cpu").n_layers == 12
