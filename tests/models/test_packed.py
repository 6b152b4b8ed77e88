"""Models of every version on packed rows: each document has the loss, the gradients and the state it has alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.models.state import LayerState
from rwkv_train.ops.context import PLAIN, packed_context

FLOAT64 = 1e-10
# Two layers in float32, each rounding a few times; relative errors of norms.
FLOAT32 = 2e-5

LENGTHS = [12, 0, 1, 33, 0, 5, 17]
backends = pytest.mark.parametrize("backend", ["cpp", "torch"])


def random_tokens(n_tokens, seed=3):
    return torch.randint(0, 50, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def row_of(lengths):
    """Tokens, targets (one in seven not scored) and the context of a packed row."""
    n_tokens = sum(lengths)
    targets = random_tokens(n_tokens, seed=4)
    targets[:, ::7] = -100
    return random_tokens(n_tokens), targets, packed_context(torch.tensor([0, *lengths]).cumsum(0))


def random_state(model, n_sequences):
    """A state as a text would leave it, of each sequence another one."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(0, 50, (n_sequences, 6), generator=generator)
    with torch.no_grad():
        state = model(text).state
    return tuple(LayerState(*(x.detach().requires_grad_() for x in layer)) for layer in state)


def row_of_state(state, s):
    return tuple(LayerState(*(x[s : s + 1] for x in layer)) for layer in state)


def tensors(state):
    return [x for layer in state for x in layer]


def gradients(model, loss, state):
    """Gradients of all used parameters and of the state the texts started from."""
    wanted = [p for p in model.parameters() if p.requires_grad] + tensors(state)
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


def packed(model, lengths, state):
    tokens, targets, context = row_of(lengths)
    output = model(tokens, state, targets, context)
    return [
        output.losses.detach(),
        *(x.detach() for x in tensors(output.state)),
        *gradients(model, output.losses.sum(), state),
    ]


def alone(model, lengths, state):
    """The same, document by document, each a plain batch of one text."""
    tokens, targets, _ = row_of(lengths)
    losses, after, total = [], [], 0
    for s, (start, end) in enumerate(pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist())):
        before = row_of_state(state, s)
        if start == end:
            after.append(tensors(before))
            continue
        output = model(tokens[:, start:end], before, targets[:, start:end], PLAIN)
        losses.append(output.losses.detach())
        after.append(tensors(output.state))
        total = total + output.losses.sum()
    final = [torch.cat([x.detach() for x in rows]) for rows in zip(*after, strict=True)]
    return [torch.cat(losses, dim=1), *final, *gradients(model, total, state)]


def assert_close(found, expected, bound):
    assert [x.shape for x in found] == [x.shape for x in expected]
    errors = [
        ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-12)).item()
        for x, y in zip(found, expected, strict=True)
    ]
    assert max(errors) < bound, errors


def start(model, lengths, from_state):
    return random_state(model, len(lengths)) if from_state else _zero_state(model, len(lengths))


def _zero_state(model, n_sequences):
    return tuple(LayerState(*(x.requires_grad_() for x in layer)) for layer in model.zero_state(n_sequences))


@pytest.mark.parametrize("from_state", [False, True], ids=["start-of-text", "given-state"])
def test_documents_in_a_row_are_as_alone_in_float64(config, perturbed_model, from_state):
    model = perturbed_model(config, wkv_backend="reference").double()
    state = start(model, LENGTHS, from_state)
    assert_close(packed(model, LENGTHS, state), alone(model, LENGTHS, state), FLOAT64)


@backends
def test_documents_in_a_row_are_as_alone_in_float32(config, perturbed_model, backend):
    exact = perturbed_model(config, wkv_backend="reference").double()
    model = perturbed_model(config, wkv_backend=backend)
    expected_state = random_state(exact, len(LENGTHS))
    state = tuple(
        LayerState(*(x.detach().float().requires_grad_() for x in layer)) for layer in expected_state
    )
    assert_close(packed(model, LENGTHS, state), alone(exact, LENGTHS, expected_state), FLOAT32)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any))
def test_losses_are_those_of_the_documents_whatever_their_lengths(lengths, models_in_float64):
    tokens, targets, context = row_of(lengths)
    for model in models_in_float64:
        with torch.no_grad():
            found = model(tokens, targets=targets, context=context).losses
            bounds = pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()])
            expected = [model(tokens[:, a:b], targets=targets[:, a:b]).losses for a, b in bounds if a < b]
        torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_a_document_never_sees_the_one_before_it(config, perturbed_model, backend):
    model = perturbed_model(config, wkv_backend=backend)
    tokens, targets, context = row_of(LENGTHS)
    changed = tokens.clone()
    changed[:, :12] = (changed[:, :12] + 1) % 50
    with torch.no_grad():
        before, after = (model(x, targets=targets, context=context) for x in (tokens, changed))
    assert torch.equal(before.losses[:, 12:], after.losses[:, 12:])
    assert not torch.equal(before.losses[:, :12], after.losses[:, :12])
    for x, y in zip(tensors(before.state), tensors(after.state), strict=True):
        assert torch.equal(x[1:], y[1:])


def test_no_state_is_the_zero_state_of_each_document(config, perturbed_model):
    model = perturbed_model(config)
    tokens, _, context = row_of(LENGTHS)
    without = model(tokens, context=context)
    assert torch.equal(without.logits, model(tokens, model.zero_state(len(LENGTHS)), context=context).logits)
    for x, zero in zip(tensors(without.state), tensors(model.zero_state(len(LENGTHS))), strict=True):
        assert torch.equal(x[[1, 4]], zero[[1, 4]])  # the empty documents


def test_rows_without_documents_change_nothing(config, perturbed_model):
    model = perturbed_model(config)
    tokens, targets, context = row_of([9, 11])
    padded = packed_context(torch.tensor([0, 9, 20, 20, 20]))
    expected = model(tokens, targets=targets, context=context).losses
    assert torch.equal(model(tokens, targets=targets, context=padded).losses, expected)


def test_blocks_that_are_computed_again_give_the_same_bits(config, perturbed_model):
    model = perturbed_model(config)
    state = random_state(model, len(LENGTHS))
    expected = packed(model, LENGTHS, state)
    model.recompute_blocks = True
    assert all(torch.equal(x, y) for x, y in zip(packed(model, LENGTHS, state), expected, strict=True))


def test_other_lengths_are_no_other_graph(config, perturbed_model):
    torch.compiler.reset()
    model = perturbed_model(config.model_copy(update={"n_layer": 1}), wkv_backend="cpp")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for lengths in ([12, 0, 28], [1, 39, 0]):
        tokens, targets, context = row_of(lengths)
        expected = model(tokens, targets=targets, context=context).losses
        torch.testing.assert_close(compiled(tokens, targets=targets, context=context).losses, expected)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_to_machine_code_a_packed_row_has_the_same_losses_and_gradients(config, perturbed_model):
    """With inductor, which once wrote over the input of a token shift that was made otherwise."""
    torch.compiler.reset()
    model = perturbed_model(config.model_copy(update={"n_layer": 1}))
    state = random_state(model, len(LENGTHS))
    expected = packed(model, LENGTHS, state)
    assert_close(packed(torch.compile(model, fullgraph=True), LENGTHS, state), expected, FLOAT32)


def test_autocast_and_bfloat16_weights_take_packed_rows(config, perturbed_model):
    model = perturbed_model(config)
    tokens, targets, context = row_of(LENGTHS)
    exact = model(tokens, targets=targets, context=context).losses
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(tokens, targets=targets, context=context).losses
    model.bfloat16()
    rounded = model(tokens, targets=targets, context=context)
    assert rounded.state[0].time_mix_x.dtype == torch.bfloat16
    for losses in (autocast, rounded.losses):
        torch.testing.assert_close(losses, exact, atol=0.1, rtol=0)  # of losses of about 4


def test_two_rows_are_no_packed_batch(config, perturbed_model, tokens):
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        perturbed_model(config)(tokens, context=packed_context(torch.tensor([0, 12])))


def test_boundaries_for_other_tokens_are_refused(config, perturbed_model):
    tokens, _, _ = row_of([12])
    with pytest.raises(ValueError, match="must go from 0 to 12, got 0 to 11"):
        perturbed_model(config)(tokens, context=packed_context(torch.tensor([0, 11])))
