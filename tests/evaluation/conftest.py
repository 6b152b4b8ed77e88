from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.data.stored import TokenDocument
from rwkv_train.models.lm import LmOutput
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.models.state import LayerState
from rwkv_train.tokenizers import load_tokenizer

CONFIGS = {
    "rwkv7": Rwkv7Config(
        n_layer=2, n_embd=32, head_size=16, vocab_size=257, lora_ranks=LoraRanks(w=8, a=8, v=8, g=8)
    ),
    "rwkv6": Rwkv6Config(n_layer=2, n_embd=32, head_size=16, vocab_size=257),
    "rwkv5": Rwkv5Config(n_layer=2, n_embd=32, head_size=16, vocab_size=257),
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=32, vocab_size=257),
}


class CountingModel:
    """Its loss tells what it was asked: a weight of the target times one plus all it has read before.

    So a token that is scored twice, not at all, or after another's context changes the sum. Its state is the
    sum of the tokens it has read, in float64, which holds every number here exactly.
    """

    def __init__(self, vocab_size=257):
        self.config = SimpleNamespace(vocab_size=vocab_size)

    def parameters(self):
        return iter([torch.zeros(1)])

    def zero_state(self, batch_size, device=None, dtype=None):
        zeros = torch.zeros(batch_size, 1, dtype=torch.float64)
        return (LayerState(zeros, zeros.clone(), zeros.clone()),)

    def initial_state(self, batch_size):
        return self.zero_state(batch_size)

    def __call__(self, tokens, state, targets=None):
        state = self.initial_state(len(tokens)) if state is None else state
        read = state[0].wkv + tokens.cumsum(dim=1)
        losses = torch.where(targets == -100, 0.0, targets * (1.0 + read))
        last = read[:, -1:]
        return LmOutput(None, losses, (LayerState(last, last.clone(), last.clone()),))


@pytest.fixture(scope="session")
def counting_model():
    return CountingModel


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(params=CONFIGS)
def model(request):
    """A small model whose every part takes part: all weights are random."""
    model = build_model(CONFIGS[request.param], wkv_backend="reference")
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def documents():
    """Twelve documents of two domains, from one token to 200."""
    random = np.random.default_rng(5)
    lengths = [3, 200, 1, 64, 65, 17, 130, 2, 40, 41, 9, 30]
    return [
        TokenDocument(random.integers(0, 257, n).astype(np.uint16), "prose" if n % 2 else "code", n + 1)
        for n in lengths
    ]
