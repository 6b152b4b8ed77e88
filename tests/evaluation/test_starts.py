"""A model with a start is evaluated and generates from it, however texts are spread over calls."""

import numpy as np
import pytest
import torch

from rwkv_train.config.model import Rwkv4Config, Rwkv7Config
from rwkv_train.evaluation.scoring import Sequence, score_sequences
from rwkv_train.evaluation.stream import score_stream
from rwkv_train.finetuning.states import learn_state
from rwkv_train.generation.generate import generate
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.generation.side_by_side import Prompt, generate_side_by_side
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import load_tokenizer

CONFIGS = {
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=16, vocab_size=257),
    "rwkv7": Rwkv7Config(n_layer=2, n_embd=16, head_size=8, vocab_size=257),
}
TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(params=CONFIGS)
def model(request):
    """A model whose learned state is far from the empty one."""
    model = build_model(CONFIGS[request.param])
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    learn_state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for parameter in model.start.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 5)
    return model


@pytest.fixture
def state(model):
    """The learned state of one text, put together from the parameters."""
    (first, second) = model.zero_state(1)
    layers = []
    for empty, part in zip((first, second), model.start.layers, strict=True):
        numbers = {name: p.detach() for name, p in part.named_parameters()}
        if "mean" in numbers:
            wkv = torch.stack((numbers["mean"], torch.ones(16), numbers["log_weight"]))
        else:
            wkv = numbers["wkv"]
        layers.append(empty._replace(wkv=wkv[None]))
    return tuple(layers)


def sequences(*lengths):
    rng = np.random.default_rng(3)
    return [Sequence(rng.integers(1, 257, n), rng.integers(1, 257, n)) for n in lengths]


@torch.no_grad()
def losses_from(model, state, inputs, targets):
    return model(torch.tensor(inputs[None]), state, torch.tensor(targets[None])).losses[0].numpy()


def test_every_sequence_is_scored_from_the_start(model, state):
    given = sequences(5, 12, 1, 7)
    for score in score_sequences(model, given, batch_size=2, chunk_len=3):
        expected = losses_from(model, state, *given[score.index])
        np.testing.assert_allclose(score.losses, expected, rtol=1e-4)
        assert np.abs(expected - losses_from(model, model.zero_state(1), *given[score.index])).max() > 1e-3


def test_a_stream_is_scored_from_the_start(model, state):
    given = sequences(5, 12, 1)
    found = np.concatenate([score.losses for score in score_stream(model, given, chunk_len=4)])
    whole = [np.concatenate(parts) for parts in zip(*given, strict=True)]
    np.testing.assert_allclose(found, losses_from(model, state, *whole), rtol=1e-4)


def test_texts_are_generated_from_the_start(model, state):
    tokens = [TOKENIZER.end_of_document, *TOKENIZER.encode("ab")]
    greedy = SamplingSettings(temperature=0.0)
    expected = list(tokens)
    for _ in range(5):
        with torch.no_grad():
            logits = model(torch.tensor([expected]), state).logits
        expected.append(int(logits[0, -1].argmax()))
    text = TOKENIZER.decode_bytes(expected[3:]).decode(errors="replace")

    alone = generate(model, TOKENIZER, "ab", greedy, max_tokens=5, seed=0)
    prompts = [Prompt(tokens, greedy, 5), Prompt(tokens, greedy, 2), Prompt(tokens, greedy, 5)]
    beside = dict(generate_side_by_side(model, TOKENIZER, prompts, batch_size=2))

    assert not alone.state[0].wkv.requires_grad
    assert "".join(alone) == text
    assert beside[0] == beside[2] == text
