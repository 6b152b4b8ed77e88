"""The list of architectures, and what is done with any of them: build, initialize, count.

The only file that knows which architectures there are. A new one is one line in ``ARCHITECTURES``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Generator, Tensor

from rwkv_train.config.model import ModelConfig, RwkvConfig
from rwkv_train.errors import ConfigError
from rwkv_train.models import rwkv4, rwkv5, rwkv6, rwkv7
from rwkv_train.models.block import Block, ChannelMix, TimeMix
from rwkv_train.models.layers import gain_of_shape, orthogonal, uniform
from rwkv_train.models.lm import LanguageModel

ConfigT = TypeVar("ConfigT", bound=RwkvConfig)


@dataclass(frozen=True)
class Architecture(Generic[ConfigT]):
    """What one version brings."""

    time_mix: Callable[[ConfigT, int, str], TimeMix]
    """Makes the time mix from the settings, the layer's index and the name of a recurrence backend."""
    channel_mix: Callable[[ConfigT], ChannelMix]
    """Makes the channel mix."""
    initial_values: Callable[[ConfigT, int, Generator], dict[str, Tensor]]
    """Gives the initial values of one layer's mixes, float32, by name within the block."""
    embedding_scale: Callable[[ConfigT], float]
    """Gives the bound of the uniform initial embeddings."""
    dropout: Callable[[ConfigT], float]
    """Gives the part of the residual stream that training sets to zero; only older versions were so trained."""
    learning_rate_factors: Mapping[str, float]
    """End of a parameter's name -> factor of its learning rate."""
    unused_parameters: frozenset[str]
    """Parameters that take no part in the result; a published file may lack them."""
    recurrence: Callable[[ConfigT], tuple[str, int | None]]
    """Gives the name of the recurrence's operator and its head size, if it has heads."""


ARCHITECTURES: Mapping[str, Architecture[Any]] = {
    "rwkv4": Architecture(
        rwkv4.TimeMix,
        rwkv4.ChannelMix,
        rwkv4.initial_values,
        rwkv4.embedding_scale,
        lambda config: config.dropout,
        rwkv4.LEARNING_RATE_FACTORS,
        rwkv4.UNUSED_PARAMETERS,
        lambda config: ("wkv4", None),
    ),
    "rwkv5": Architecture(
        rwkv5.TimeMix,
        rwkv4.ChannelMix,
        rwkv5.initial_values,
        rwkv5.embedding_scale,
        lambda config: config.dropout,
        rwkv5.LEARNING_RATE_FACTORS,
        rwkv5.UNUSED_PARAMETERS,
        lambda config: ("wkv5", config.head_size),
    ),
    "rwkv6": Architecture(
        rwkv6.TimeMix,
        rwkv6.ChannelMix,
        rwkv6.initial_values,
        rwkv5.embedding_scale,
        lambda config: config.dropout,
        rwkv6.LEARNING_RATE_FACTORS,
        rwkv6.UNUSED_PARAMETERS,
        lambda config: ("wkv6", config.head_size),
    ),
    "rwkv7": Architecture(
        rwkv7.TimeMix,
        rwkv7.ChannelMix,
        rwkv7.initial_values,
        rwkv7.embedding_scale,
        lambda config: 0.0,
        rwkv7.LEARNING_RATE_FACTORS,
        rwkv7.UNUSED_PARAMETERS,
        lambda config: ("wkv7", config.head_size),
    ),
}


def build_model(
    config: ModelConfig, *, wkv_backend: str = "auto", device: torch.device | str = "cpu"
) -> LanguageModel:
    """Build a model in float32 whose parameters are all zero, to be initialized or loaded.

    Args:
        config: settings of the model.
        wkv_backend: backend of the recurrence.
        device: where it lies; ``"meta"`` gives shapes without memory.
    """
    architecture = ARCHITECTURES[config.arch]
    dropout = architecture.dropout(config)
    # Made without memory first: the constructors of PyTorch would fill it with random numbers nobody wants.
    with torch.device("meta"):
        model = LanguageModel(
            config,
            (
                Block(
                    config.n_embd,
                    is_first=layer_index == 0,
                    att=architecture.time_mix(config, layer_index, wkv_backend),
                    ffn=architecture.channel_mix(config),
                    dropout=dropout,
                )
                for layer_index in range(config.n_layer)
            ),
            dropout=dropout,
        )
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def initialize(model: LanguageModel, seed: int) -> None:
    """Give every parameter its published initial value.

    The values are computed in float32 and then rounded to each parameter's dtype, so a seed means the same
    model in any precision. PyTorch's global random numbers are neither used nor changed.

    Raises:
        ConfigError: there are no published initial values for the model's settings.
    """
    if model.config.why_not_from_scratch is not None:
        raise ConfigError(f"model.{model.config.why_not_from_scratch}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    missing = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, value in _initial_values(model.config, generator):
            parameter = model.get_parameter(name)
            assert parameter.shape == value.shape, name
            parameter.copy_(value)
            missing.remove(name)
    assert not missing, f"no initial value: {missing}"


def _initial_values(config: ModelConfig, generator: Generator) -> Iterator[tuple[str, Tensor]]:
    architecture = ARCHITECTURES[config.arch]
    V, C = config.vocab_size, config.n_embd
    yield "emb.weight", uniform(V, C, architecture.embedding_scale(config), generator)
    norms = [
        "blocks.0.ln0",
        *(f"blocks.{i}.{ln}" for i in range(config.n_layer) for ln in ("ln1", "ln2")),
        "ln_out",
    ]
    for norm in norms:
        yield f"{norm}.weight", torch.ones(C)
        yield f"{norm}.bias", torch.zeros(C)
    for layer_index in range(config.n_layer):
        for name, value in architecture.initial_values(config, layer_index, generator).items():
            yield f"blocks.{layer_index}.{name}", value
    yield "head.weight", orthogonal(V, C, generator, 0.5 * gain_of_shape(V, C))


def count_parameters(config: ModelConfig) -> int:
    """Count a model's parameters, with those that take no part in the result, without memory for them."""
    return sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())


def learning_rate_factors(arch: str) -> Mapping[str, float]:
    """Return an architecture's table: end of a parameter's name -> factor of its learning rate."""
    return ARCHITECTURES[arch].learning_rate_factors


def unused_parameters(arch: str) -> frozenset[str]:
    """Return the names of an architecture's parameters that take no part in the result.

    They ask for no gradient, and a published file may lack them.
    """
    return ARCHITECTURES[arch].unused_parameters


def recurrence_of(config: ModelConfig) -> tuple[str, int | None]:
    """Return the operator of a model's recurrence (``"wkv7"``, say) and its head size, if it has heads."""
    return ARCHITECTURES[config.arch].recurrence(config)


def has_weight_decay(name: str) -> bool:
    """Tell whether a parameter decays: in every version the matrices of linear layers and of the embedding.

    Norms do not, nor vectors, low-rank pairs and ``r_k``. The name tells, since under ZeRO-3 a shape does not.
    """
    *_, module, kind = name.split(".")
    return kind == "weight" and not module.startswith("ln")
