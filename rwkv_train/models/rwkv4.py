"""RWKV-4 "Dove": a vector state for each channel, a decay that does not depend on the text.

Names in a checkpoint: ``time_mix_*`` is how much of the current token (not of the one before) a projection
sees; ``time_decay`` is the log of the negative log decay; ``time_first`` is added to the current token's key.

Source:
    Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048; initial values from
    RWKV-LM, ``RWKV-v4neo/src/model.py``.
"""

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from rwkv_train.config.model import Rwkv4Config, Rwkv5Config
from rwkv_train.models.layers import (
    at_least_float32,
    channel_ratios,
    full_channel_ratios,
    gain_of_shape,
    last_token,
    layer_ratios,
    orthogonal,
    relu_squared,
    shift_tokens,
)
from rwkv_train.models.state import LayerState
from rwkv_train.ops.context import SequenceContext
from rwkv_train.ops.wkv4 import wkv4, wkv4_zero_state

LEARNING_RATE_FACTORS: Mapping[str, float] = {"att.time_decay": 2.0, "att.time_first": 3.0}
"""End of a parameter's name -> factor of its learning rate; every other parameter has 1."""

UNUSED_PARAMETERS: frozenset[str] = frozenset()
"""Parameters of the published files that take no part in the result."""


class TimeMix(nn.Module):
    """Weighted mean of past values, weights ``exp(key)`` that decay over time (the "att" of a checkpoint)."""

    def __init__(self, config: Rwkv4Config, layer_index: int, wkv_backend: str) -> None:
        super().__init__()
        C = config.n_embd
        self.n_embd = C
        self.wkv_backend = wkv_backend
        self.time_decay = nn.Parameter(torch.empty(C))
        self.time_first = nn.Parameter(torch.empty(C))
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Mix tokens; see :class:`rwkv_train.models.block.TimeMix`."""
        previous = shift_tokens(x, state.time_mix_x, context)
        change = x - previous
        k = self.key(previous + change * self.time_mix_k)
        v = self.value(previous + change * self.time_mix_v)
        r = self.receptance(previous + change * self.time_mix_r)

        w = -torch.exp(at_least_float32(self.time_decay))
        u = at_least_float32(self.time_first)
        y, wkv = wkv4(w, u, k, v, state.wkv, context, backend=self.wkv_backend)
        y = self.output(torch.sigmoid(r) * y)
        return y, LayerState(last_token(x, state.time_mix_x, context), wkv, state.channel_mix_x), v_first

    def zero_wkv(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the recurrence's state before any token, ``[B, 3, C]``."""
        return wkv4_zero_state(batch_size, self.n_embd, device, dtype)


class ChannelMix(nn.Module):
    """Two-layer MLP with a squared ReLU and a gate, on token-shifted inputs (the "ffn" of a checkpoint).

    RWKV-5 has the same, of another width.
    """

    def __init__(self, config: Rwkv4Config | Rwkv5Config) -> None:
        super().__init__()
        C, F = config.n_embd, config.ffn_width
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, F, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor, state: LayerState, context: SequenceContext) -> tuple[Tensor, LayerState]:
        """Mix channels; see :class:`rwkv_train.models.block.ChannelMix`."""
        previous = shift_tokens(x, state.channel_mix_x, context)
        change = x - previous
        hidden = relu_squared(self.key(previous + change * self.time_mix_k))  # [B, T, F]
        gate = torch.sigmoid(self.receptance(previous + change * self.time_mix_r))
        return gate * self.value(hidden), LayerState(
            state.time_mix_x, state.wkv, last_token(x, state.channel_mix_x, context)
        )


def embedding_scale(config: Rwkv4Config) -> float:
    """Return the bound of the initial embeddings; the published trainer takes its learning rate for it."""
    return config.embedding_scale


def initial_values(config: Rwkv4Config, layer_index: int, generator: Generator) -> dict[str, Tensor]:
    """Return one layer's published initial values in float32, by parameter name within the block."""
    C, F = config.n_embd, config.ffn_width
    r01, r10 = layer_ratios(layer_index, config.n_layer)
    d = channel_ratios(C)
    mix_k = d.pow(r10).view(1, 1, C)
    # Thirds of the channels start with a bonus of ln 0.3 less, equal to and more than it by a half.
    zigzag = 0.5 * ((torch.arange(C, device="cpu") + 1) % 3 - 1)
    return {
        "att.time_decay": -5 + 8 * full_channel_ratios(C).pow(0.7 + 1.3 * r01),
        "att.time_first": math.log(0.3) + zigzag,
        "att.time_mix_k": mix_k,
        "att.time_mix_v": mix_k + 0.3 * r01,
        "att.time_mix_r": d.pow(0.5 * r10).view(1, 1, C),
        "att.key.weight": torch.zeros(C, C),
        "att.value.weight": orthogonal(C, C, generator),
        "att.receptance.weight": torch.zeros(C, C),
        "att.output.weight": torch.zeros(C, C),
        "ffn.time_mix_k": mix_k,
        "ffn.time_mix_r": mix_k,
        "ffn.key.weight": orthogonal(F, C, generator, gain_of_shape(F, C)),
        "ffn.receptance.weight": torch.zeros(C, C),
        "ffn.value.weight": torch.zeros(C, F),
    }
