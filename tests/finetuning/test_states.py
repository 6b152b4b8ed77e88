"""Learned starts: their gradients by finite differences, and texts that start from them."""

import pytest
import torch

from rwkv_train.config.methods import PrefixMethod
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.finetuning.states import export_start, learn_prefix, learn_state
from rwkv_train.models.start import FixedStart
from rwkv_train.models.state import LayerState
from rwkv_train.ops.context import PLAIN, packed_context

TEXT = [7, 3, 3, 11]


def encode(text):
    return [TEXT[int(character)] for character in text]


def random_tokens(*shape):
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(5))


BATCHES = {
    "plain": (random_tokens(2, 7), PLAIN),
    # Four conversations in one row, one of them without tokens.
    "packed": (random_tokens(1, 12), packed_context(torch.tensor([0, 5, 5, 9, 12]))),
}


def with_learned_state(model):
    """Learn the state of a model, from somewhere else than where it begins."""
    learn_state(model)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.start.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1:
                parameter.sub_(parameter.mean())  # a weight of RWKV-4 that counts
    return model


def with_learned_prefix(model):
    learn_prefix(model, PrefixMethod(method="prefix", n_tokens=3), encode, seed=0)
    return model


LEARN = {"state": with_learned_state, "prefix": with_learned_prefix}


@pytest.fixture(params=LEARN)
def learn(request):
    return LEARN[request.param]


def loss_of(model, batch):
    tokens, context = BATCHES[batch]
    return model(tokens, targets=tokens.roll(-1, dims=1), context=context).losses.sum()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_equal_finite_differences(tiny_model, arch, learn, batch, backend):
    model = learn(tiny_model(arch, backend).double())
    loss_of(model, batch).backward()
    generator = torch.Generator().manual_seed(8)
    step = 3e-6  # the error of a difference grows with its square, and that of rounding with 1 over it

    for name, parameter in model.start.named_parameters():
        for _ in range(2):
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            at = {}
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * step * direction)
                    at[sign] = loss_of(model, batch).item()
                    parameter.sub_(sign * step * direction)
            numeric = (at[1] - at[-1]) / (2 * step)
            assert abs(numeric) > 1e-6, f"{name} has no gradient that could be compared"
            assert (parameter.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-5, abs=1e-9)


def test_only_what_is_new_learns(tiny_model, arch, learn):
    model = tiny_model(arch)
    base = {name for name, _ in model.named_parameters()}
    learn(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters()} - base
    assert learning
    assert all(name.startswith("start.") for name in learning)


def test_blocks_computed_again_have_the_same_gradients_bit_for_bit(tiny_model, arch, learn):
    model = learn(tiny_model(arch))
    gradients = []
    for model.recompute_blocks in (False, True):
        model.zero_grad()
        loss_of(model, "packed").backward()
        gradients.append([parameter.grad for parameter in model.start.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_packed_conversations_start_from_the_state_as_each_alone(tiny_model, arch, learn):
    model = learn(tiny_model(arch).double())
    tokens, context = BATCHES["packed"]

    packed = model(tokens, context=context)

    alone = [model(tokens[:, part]) for part in (slice(0, 5), slice(5, 9), slice(9, 12))]
    torch.testing.assert_close(packed.logits, torch.cat([output.logits for output in alone], dim=1))
    for row, output in zip((0, 2, 3), alone, strict=True):
        for got, expected in zip(packed.state, output.state, strict=True):
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x[row], y[0])


def test_texts_do_start_elsewhere(tiny_model, arch, learn):
    model = tiny_model(arch)
    tokens, _ = BATCHES["plain"]
    before = model(tokens).logits
    assert (learn(model)(tokens).logits - before).abs().amax() > 1e-3


@pytest.mark.parametrize("arch", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_matrix_state_begins_with_the_model_as_it_was(tiny_model, arch):
    model = tiny_model(arch)
    tokens, context = BATCHES["packed"]
    before = model(tokens, context=context).logits
    learn_state(model)
    assert torch.equal(model(tokens, context=context).logits, before)


def test_the_mean_of_rwkv4_begins_with_little_weight_and_a_gradient(tiny_model):
    model = tiny_model("rwkv4").double()
    tokens, _ = BATCHES["plain"]
    before = model(tokens).logits
    learn_state(model)
    change = (model(tokens).logits - before).abs().amax() / before.abs().amax()
    assert 0 < change < 0.05

    loss_of(model, "plain").backward()
    for layer in model.start.layers:
        assert layer.mean.grad.abs().min() > 0


def test_the_empty_state_of_rwkv4_has_no_gradient(tiny_model):
    """Why its learned state does not begin there."""
    model = tiny_model("rwkv4").double()
    state = [LayerState(*(x.requires_grad_() for x in layer)) for layer in model.zero_state(2)]
    model(BATCHES["plain"][0], state).logits.sum().backward()
    assert state[1].wkv.grad.abs().max() == 0


def test_a_prefix_from_a_text_is_that_text(tiny_model, arch):
    model = tiny_model(arch)
    tokens, _ = BATCHES["plain"]
    text = torch.tensor([TEXT + TEXT[:2]]).expand(2, -1)
    after_text = model(tokens, model(text).state).logits

    learn_prefix(model, PrefixMethod(method="prefix", n_tokens=6, text="0123"), encode, seed=0)

    torch.testing.assert_close(model(tokens).logits, after_text, atol=1e-6, rtol=1e-6)


def test_a_prefix_of_random_tokens_is_of_the_seed(tiny_model):
    def embeddings(seed):
        model = tiny_model("rwkv7")
        learn_prefix(model, PrefixMethod(method="prefix"), encode, seed=seed)
        rows = model.start.embeddings
        assert rows.shape == (16, 16)
        assert all((row == model.emb.weight).all(dim=1).any() for row in rows)
        return rows

    assert torch.equal(embeddings(1), embeddings(1))
    assert not torch.equal(embeddings(1), embeddings(2))


def test_a_prefix_of_nothing_or_of_other_tokens_is_refused(tiny_model):
    method = PrefixMethod(method="prefix", text="")
    with pytest.raises(ConfigError, match=r"finetune\.text is '', of which the tokenizer makes no token"):
        learn_prefix(tiny_model("rwkv7"), method, encode, seed=0)
    method = PrefixMethod(method="prefix", text="0")
    with pytest.raises(DataError, match=r"token 20 of finetune\.text is beyond the model's vocabulary of 20"):
        learn_prefix(tiny_model("rwkv7"), method, lambda text: [20], seed=0)


def test_an_exported_start_is_the_learned_one(tiny_model, arch, learn):
    model = learn(tiny_model(arch))
    tokens, context = BATCHES["packed"]
    learned = model(tokens, context=context).logits

    state = export_start(model)

    assert model.training
    assert not any(x.requires_grad for layer in state for x in layer)
    given = tiny_model(arch)
    given.start = FixedStart(state)
    torch.testing.assert_close(given(tokens, context=context).logits, learned, atol=1e-6, rtol=1e-6)


def test_a_start_has_the_dtypes_and_rows_of_the_empty_state(tiny_model, arch, learn):
    model = learn(tiny_model(arch)).bfloat16()
    for batch_size in (0, 1, 3):
        for got, empty in zip(model.initial_state(batch_size), model.zero_state(batch_size), strict=True):
            assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in empty]
