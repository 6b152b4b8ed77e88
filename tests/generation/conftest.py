from types import SimpleNamespace

import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.models.lm import LmOutput
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.models.state import LayerState
from rwkv_train.tokenizers import load_tokenizer

CONFIGS = {
    "rwkv7": Rwkv7Config(
        n_layer=2, n_embd=32, head_size=16, vocab_size=300, lora_ranks=LoraRanks(w=8, a=8, v=8, g=8)
    ),
    "rwkv6": Rwkv6Config(n_layer=2, n_embd=32, head_size=16, vocab_size=300),
    "rwkv5": Rwkv5Config(n_layer=2, n_embd=32, head_size=16, vocab_size=300),
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=32, vocab_size=300),
}


class ScriptedModel:
    """Predicts the tokens of a script, one after another; its state is the list of all tokens it has read.

    The script begins after the first call for one text, whatever it reads.
    """

    def __init__(self, script, vocab_size=257):
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.script = script
        self.lengths_read = []
        self.n_answered = 0

    def parameters(self):
        return iter([torch.zeros(1)])

    def zero_state(self, batch_size, device=None, dtype=None):
        empty = torch.zeros(batch_size, 0, dtype=torch.int64)
        return (LayerState(empty, empty, empty),)

    def initial_state(self, batch_size):
        return self.zero_state(batch_size)

    def __call__(self, tokens, state):
        state = self.initial_state(len(tokens)) if state is None else state
        self.lengths_read.append(tokens.shape[1])
        history = torch.cat([state[0].wkv, tokens], dim=1)
        logits = torch.zeros(1, tokens.shape[1], self.config.vocab_size)
        logits[0, -1, self.script[self.n_answered % len(self.script)]] = 1
        self.n_answered += 1
        return LmOutput(logits, None, (LayerState(history, history.clone(), history.clone()),))


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def scripted(tokenizer):
    """Make a model that writes a text (str or bytes), then the end of the document."""

    def make(text, **options):
        script = [byte + 1 for byte in (text.encode() if isinstance(text, str) else text)]
        return ScriptedModel([*script, tokenizer.end_of_document], **options)

    return make


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
