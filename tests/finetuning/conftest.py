from collections.abc import Callable

import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, initialize

CONFIGS = {
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=16, vocab_size=20),
    "rwkv5": Rwkv5Config(n_layer=2, n_embd=16, head_size=8, vocab_size=20),
    "rwkv6": Rwkv6Config(
        n_layer=2, n_embd=16, head_size=8, vocab_size=20, lora_ranks=Rwkv6Ranks(shift=4, decay=6)
    ),
    "rwkv7": Rwkv7Config(
        n_layer=2, n_embd=16, head_size=8, vocab_size=20, lora_ranks=LoraRanks(w=4, a=4, v=4, g=4)
    ),
}


@pytest.fixture(params=CONFIGS)
def arch(request) -> str:
    """Name of a version."""
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., LanguageModel]:
    """Makes a tiny model of a version, a little away from its initial values, where many weights are zero."""

    def make(arch: str, wkv_backend: str = "auto") -> LanguageModel:
        model = build_model(CONFIGS[arch], wkv_backend=wkv_backend)
        initialize(model, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make
