import math
from collections.abc import Callable

import pytest
import torch

from rwkv_train.config.model import ModelConfig
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model

# Mean and standard deviation by the end of a parameter's name. Chosen so that every term of the formulas
# counts: no low-rank pair, bias or mix is zero, and decays lie anywhere between the slowest and the fastest.
VECTORS = {
    "w0": (-1.0, 2.0),
    "a0": (0.0, 1.0),
    "v0": (0.0, 1.0),
    "k_k": (0.8, 0.3),
    "k_a": (1.0, 0.3),
    "r_k": (0.0, 0.3),
    "time_decay": (-1.0, 2.0),
    "time_first": (0.0, 1.0),
    "time_faaaa": (0.0, 1.0),
    "bias": (0.0, 0.2),
}


@torch.no_grad()
def fill(model: LanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if last in VECTORS:
            mean, deviation = VECTORS[last]
            value = mean + deviation * noise
        elif (
            last[-1] in "12"
        ):  # low-rank pairs, [in, rank] and [rank, out]; RWKV-6 has five of the latter in one
            value = noise / math.sqrt(parameter.shape[-2])
        elif last.startswith(("x_", "time_mix_", "time_maa_")):
            value = torch.rand(parameter.shape, generator=generator)
        elif parameter.ndim == 1:  # the weights of norms
            value = 1 + 0.2 * noise
        else:
            value = noise / math.sqrt(parameter.shape[-1])
        parameter.copy_(value)
    probe = torch.randint(0, model.config.vocab_size, (1, 32), generator=generator)
    model.head.weight.mul_(2 / model(probe).logits.std())


@pytest.fixture
def random_model() -> Callable[..., LanguageModel]:
    """Makes a model with random weights whose logits have a standard deviation of about 2."""

    def make(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
        model = build_model(config).to(dtype)
        fill(model, seed)
        return model.requires_grad_(False)

    return make
