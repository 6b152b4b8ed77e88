import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rwkv_train.config.model import Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.models import rwkv5, rwkv6, rwkv7
from rwkv_train.models.registry import unused_parameters

# bfloat16 keeps 8 bits; through two layers the logits (standard deviation about 0.6) lose a little more.
BFLOAT16_TOLERANCE = 0.06
RWKV7 = Rwkv7Config(n_layer=2, n_embd=32, head_size=8, vocab_size=50)


def test_reading_token_by_token_or_in_parts_is_the_same_as_at_once(config, perturbed_model, tokens):
    model = perturbed_model(config)
    whole = model(tokens)
    for cuts in ([5], list(range(1, 12)), [1, 3, 11]):
        state, rows = None, []
        for start, end in zip([0, *cuts], [*cuts, 12], strict=True):
            part = model(tokens[:, start:end], state)
            state = part.state
            rows.append(part.logits)
        torch.testing.assert_close(torch.cat(rows, dim=1), whole.logits)
        for got, expected in zip(state, whole.state, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_token_changes_no_logits_before_it(config, perturbed_model, tokens, position):
    model = perturbed_model(config)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 50

    before, after = model(tokens).logits, model(changed).logits

    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.isclose(before[:, position:], after[:, position:]).all(dim=-1).any()


def test_texts_in_a_batch_do_not_see_each_other(config, perturbed_model, tokens):
    model = perturbed_model(config)
    together = model(tokens).logits
    for row in range(2):
        torch.testing.assert_close(model(tokens[row : row + 1]).logits, together[row : row + 1])


def test_no_state_is_the_zero_state(config, perturbed_model, tokens):
    model = perturbed_model(config)
    assert torch.equal(model(tokens).logits, model(tokens, model.zero_state(2)).logits)


def test_losses_are_negative_log_likelihoods_in_float32(config, perturbed_model, tokens):
    model = perturbed_model(config)
    targets = tokens.roll(-1, dims=1)
    output = model(tokens, targets=targets)

    probabilities = model(tokens).logits.double().softmax(dim=-1)
    expected = -probabilities.gather(2, targets[..., None]).squeeze(2).log()

    assert output.logits is None
    assert output.losses.dtype == torch.float32
    torch.testing.assert_close(output.losses.double(), expected, atol=1e-5, rtol=0)


def test_losses_of_a_bfloat16_model_are_computed_in_float32(config, perturbed_model, tokens):
    model = perturbed_model(config).bfloat16()
    losses = model(tokens, targets=tokens).losses

    scores = model(tokens).logits.double().log_softmax(dim=-1)
    expected = -scores.gather(2, tokens[..., None]).squeeze(2)

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)


def test_penalties_come_where_they_are_asked_for(config, perturbed_model, tokens):
    model = perturbed_model(config)
    output = model(tokens, targets=tokens, with_penalty=True)
    torch.testing.assert_close(output.penalties, model(tokens).logits.amax(-1) ** 2 / 2)
    assert torch.equal(output.losses, model(tokens, targets=tokens).losses)
    assert model(tokens, targets=tokens).penalties is None


def test_a_masked_target_has_no_loss(config, perturbed_model, tokens):
    targets = tokens.clone()
    targets[0, 3] = -100
    losses = perturbed_model(config)(tokens, targets=targets).losses
    assert losses[0, 3] == 0
    assert (losses != 0).sum() == tokens.numel() - 1


def test_every_used_parameter_gets_a_gradient(config, perturbed_model, tokens):
    model = perturbed_model(config)
    model(tokens, targets=tokens.roll(-1, dims=1)).losses.mean().backward()
    without = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert without == unused_parameters(config.arch)


def test_the_gradient_reaches_the_state(config, perturbed_model, tokens):
    model = perturbed_model(config)
    state = tuple(
        type(layer)(*(tensor.detach().requires_grad_() for tensor in layer))
        for layer in model(tokens[:, :4]).state
    )
    model(tokens[:, 4:], state).logits.square().sum().backward()
    assert all(layer.time_mix_x.grad.any() and layer.channel_mix_x.grad.any() for layer in state)
    assert all(layer.wkv.grad.any() for layer in state)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone. Runs under DeepSpeed in other tests leave one, which DeepSpeed holds on to."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_training_waits_for_no_unused_parameter(config, perturbed_model, tokens, process_group):
    model = DistributedDataParallel(perturbed_model(config))
    for _ in range(3):  # a parameter without a gradient stops the second forward or the third
        model(tokens, targets=tokens).losses.mean().backward()
    # Before the group: as its last holder, DDP would end the group's thread while it keeps that from ending.
    del model


def test_autocast_computes_in_bfloat16_and_keeps_the_recurrence_in_float32(config, perturbed_model, tokens):
    model = perturbed_model(config)
    exact = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens)
        losses = model(tokens, targets=tokens).losses
    losses.mean().backward()

    assert output.logits.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert all(layer.wkv.dtype == torch.float32 for layer in output.state)
    torch.testing.assert_close(output.logits.float(), exact, atol=BFLOAT16_TOLERANCE, rtol=0)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


def test_bfloat16_weights_compute_in_bfloat16_and_keep_the_recurrence_in_float32(
    config, perturbed_model, tokens
):
    model = perturbed_model(config)
    exact = model(tokens).logits
    model.bfloat16()
    first = model(tokens[:, :7])
    second = model(tokens[:, 7:], first.state)

    assert first.logits.dtype == torch.bfloat16
    for layer in second.state:
        assert layer.wkv.dtype == torch.float32
        assert layer.time_mix_x.dtype == layer.channel_mix_x.dtype == torch.bfloat16
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits.float(), exact, atol=BFLOAT16_TOLERANCE, rtol=0)


def test_a_float64_model_computes_in_float64(config, perturbed_model, tokens):
    model = perturbed_model(config).double()
    output = model(tokens)
    tensors = [output.logits, *(tensor for layer in output.state for tensor in layer)]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


@pytest.fixture
def operands(monkeypatch):
    """What the recurrence of RWKV-7 is called with, one entry for each layer."""
    seen = []
    operator = rwkv7.wkv7

    def watch(r, w, k, v, a, b, *rest, **options):
        seen.append({"r": r, "w": w, "k": k, "v": v, "a": a, "b": b})
        return operator(r, w, k, v, a, b, *rest, **options)

    monkeypatch.setattr(rwkv7, "wkv7", watch)
    return seen


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16-weights"])
def test_the_log_decay_of_rwkv7_reaches_the_operator_unrounded(perturbed_model, tokens, operands, autocast):
    model = perturbed_model(RWKV7)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(tokens)

    assert len(operands) == RWKV7.n_layer
    for layer in operands:
        w = layer.pop("w")
        assert w.dtype == torch.float32
        assert not torch.equal(w, w.bfloat16().float())
        assert {tensor.dtype for tensor in layer.values()} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16-weights"])
@pytest.mark.parametrize(
    ("module", "op", "kind"),
    [(rwkv5, "wkv5", Rwkv5Config), (rwkv6, "wkv6", Rwkv6Config)],
    ids=["rwkv5", "rwkv6"],
)
def test_the_log_decay_of_rwkv5_and_6_reaches_the_operator_unrounded(
    perturbed_model, tokens, monkeypatch, module, op, kind, autocast
):
    seen = []
    operator = getattr(module, op)

    def watch(r, w, k, v, *rest, **options):
        seen.append((r, w, k, v))
        return operator(r, w, k, v, *rest, **options)

    monkeypatch.setattr(module, op, watch)
    model = perturbed_model(kind(n_layer=2, n_embd=32, head_size=8, vocab_size=50))
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(tokens)

    assert len(seen) == 2
    for r, w, k, v in seen:
        assert w.dtype == torch.float32
        assert (w < 0).all()
        assert not torch.equal(w, w.bfloat16().float())
        assert {tensor.dtype for tensor in (r, k, v)} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("kind", [Rwkv5Config, Rwkv6Config])
def test_dividing_the_heads_before_their_norm_is_a_larger_epsilon(perturbed_model, tokens, kind):
    sizes = {"n_layer": 1, "n_embd": 32, "head_size": 8, "vocab_size": 50}
    logits = []
    for divisor, factor in ((8.0, 1.0), (2.0, 0.25), (2.0, 1.0)):
        model = perturbed_model(kind(**sizes, head_size_divisor=divisor))
        model.blocks[0].att.value.weight.mul_(factor)  # the recurrence is linear in the values
        logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


@torch.no_grad()
def test_the_decay_of_rwkv7_lies_in_its_published_range(perturbed_model, tokens, operands):
    model = perturbed_model(RWKV7)
    for block in model.blocks:
        block.att.w0.normal_(0, 100, generator=torch.Generator().manual_seed(0))
    model(tokens)
    decay = torch.stack([layer["w"] for layer in operands]).exp()
    assert decay.min().item() == pytest.approx(0.5452, abs=1e-4)
    assert decay.max().item() == 1.0


@torch.no_grad()
def test_rwkv7_removes_along_unit_keys(perturbed_model, tokens, operands):
    perturbed_model(RWKV7)(tokens)
    lengths = torch.stack([layer["a"] for layer in operands]).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_a_model_compiles_as_one_graph(config, perturbed_model, tokens):
    # A named backend: choosing and loading one is the business of whoever builds the model, ahead of the graph.
    model = perturbed_model(config, wkv_backend="reference")
    few = tokens[:, :3]  # each is traced by itself
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(few).logits, model(few).logits)


def test_the_state_keeps_no_more_than_itself(config, perturbed_model, tokens):
    with torch.no_grad():
        state = perturbed_model(config)(tokens).state
    for layer in state:
        for tensor in layer:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_the_zero_state_takes_the_batch_device_and_dtype_that_are_asked_for(config, perturbed_model):
    state = perturbed_model(config).zero_state(3, "meta", torch.bfloat16)
    assert len(state) == config.n_layer
    for layer in state:
        assert layer.time_mix_x.shape == layer.channel_mix_x.shape == (3, config.n_embd)
        assert layer.time_mix_x.dtype == torch.bfloat16
        assert layer.wkv.dtype == torch.float32
        assert {tensor.device.type for tensor in layer} == {"meta"}


def test_a_state_of_another_depth_is_refused(config, perturbed_model, tokens):
    model = perturbed_model(config)
    with pytest.raises(ValueError, match="zip"):
        model(tokens, model.zero_state(2)[:1])


def test_no_module_keeps_a_state(config, perturbed_model, tokens):
    model = perturbed_model(config)
    model(tokens)
    assert not list(model.buffers())
    assert all(
        not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter)
        for module in model.modules()
        for value in vars(module).values()
    )
