from collections.abc import Callable

import pytest
import torch

from rwkv_train.config.model import (
    ModelConfig,
    Rwkv4Config,
    Rwkv5Config,
    Rwkv6Config,
    Rwkv6Ranks,
    Rwkv7Config,
)
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, initialize

CONFIGS: dict[str, ModelConfig] = {
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=32, vocab_size=50),
    "rwkv5": Rwkv5Config(n_layer=2, n_embd=32, head_size=8, vocab_size=50),
    "rwkv6": Rwkv6Config(
        n_layer=2, n_embd=32, head_size=8, vocab_size=50, lora_ranks=Rwkv6Ranks(shift=4, decay=6)
    ),
    "rwkv7": Rwkv7Config(n_layer=2, n_embd=32, head_size=8, vocab_size=50),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    """A tiny model of each version."""
    return CONFIGS[request.param]


def _perturbed_model(config: ModelConfig, wkv_backend: str = "auto") -> LanguageModel:
    model = build_model(config, wkv_backend=wkv_backend)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def perturbed_model() -> Callable[..., LanguageModel]:
    """Makes a model a little away from its initial values, where many weights are zero."""
    return _perturbed_model


@pytest.fixture(scope="session")
def models_in_float64() -> list[LanguageModel]:
    """A tiny model of each version that computes with the definition of its recurrence."""
    return [_perturbed_model(config, wkv_backend="reference").double() for config in CONFIGS.values()]


@pytest.fixture
def tokens() -> torch.Tensor:
    """Ids for the tiny models, ``[2, 12]``."""
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(3))
