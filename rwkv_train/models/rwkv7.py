"""RWKV-7 "Goose": a matrix state for each head, edited with a generalized delta rule.

Names in a checkpoint: ``x_*`` is how much of the previous token a projection sees; ``w*``, ``a*``, ``v*`` and
``g*`` are the decay, the in-context learning rate, the value residual and the gate, each with a bias (0) and
a low-rank pair (1, 2) stored as ``[in, rank]`` and ``[rank, out]``; ``k_k`` and ``k_a`` scale the removed key
and how the learning rate changes the added one; ``r_k`` weighs the current token.

Source:
    Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456; initial values
    from RWKV-LM, ``RWKV-v7/train_temp/src/model.py`` (today and before May 2025).
"""

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rwkv_train.config.model import Rwkv7Config
from rwkv_train.models.layers import (
    HeadNorm,
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
from rwkv_train.ops.wkv7 import wkv7, wkv7_zero_state

LEARNING_RATE_FACTORS: Mapping[str, float] = {"att.w0": 2.0}
"""End of a parameter's name -> factor of its learning rate; every other parameter has 1."""

UNUSED_PARAMETERS: frozenset[str] = frozenset(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))
"""Parameters that take no part in the result: the first layer has no earlier values to mix in. Published
files have them or lack them. They ask for no gradient, so neither DDP nor an optimizer waits for one."""

HEAD_NORM_EPS = 64e-5
"""The published value for every head size: 1e-5, once applied to outputs divided by 8, the root of 64."""

FASTEST_LOG_DECAY = -math.exp(-0.5)
"""Lower bound of the log decay: the decay of a channel is never below exp(-0.607) = 0.545 a token."""


class TimeMix(nn.Module):
    """Heads that store values under keys in a matrix state (the "att" of a checkpoint)."""

    def __init__(self, config: Rwkv7Config, layer_index: int, wkv_backend: str) -> None:
        super().__init__()
        C, H, N, ranks = config.n_embd, config.n_head, config.head_size, config.ranks
        self.n_head, self.head_size = H, N
        self.wkv_backend = wkv_backend
        self.x_r = nn.Parameter(torch.empty(1, 1, C))
        self.x_w = nn.Parameter(torch.empty(1, 1, C))
        self.x_k = nn.Parameter(torch.empty(1, 1, C))
        self.x_v = nn.Parameter(torch.empty(1, 1, C))
        self.x_a = nn.Parameter(torch.empty(1, 1, C))
        self.x_g = nn.Parameter(torch.empty(1, 1, C))
        self.w0 = nn.Parameter(torch.empty(1, 1, C))
        self.w1 = nn.Parameter(torch.empty(C, ranks.w))
        self.w2 = nn.Parameter(torch.empty(ranks.w, C))
        self.a0 = nn.Parameter(torch.empty(1, 1, C))
        self.a1 = nn.Parameter(torch.empty(C, ranks.a))
        self.a2 = nn.Parameter(torch.empty(ranks.a, C))
        mixes_first_values = layer_index > 0  # else unused: see UNUSED_PARAMETERS
        self.v0 = nn.Parameter(torch.empty(1, 1, C), requires_grad=mixes_first_values)
        self.v1 = nn.Parameter(torch.empty(C, ranks.v), requires_grad=mixes_first_values)
        self.v2 = nn.Parameter(torch.empty(ranks.v, C), requires_grad=mixes_first_values)
        self.g1 = nn.Parameter(torch.empty(C, ranks.g))
        self.g2 = nn.Parameter(torch.empty(ranks.g, C))
        self.k_k = nn.Parameter(torch.empty(1, 1, C))
        self.k_a = nn.Parameter(torch.empty(1, 1, C))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = HeadNorm(C, HEAD_NORM_EPS)

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Mix tokens; see :class:`rwkv_train.models.block.TimeMix`.

        With ``z_j = x + (x_prev - x) x_j`` for each projection ``j``::

            w = -exp(-1/2) sigmoid(w0 + tanh(z_w w1) w2)          log decay
            a = sigmoid(a0 + z_a a1 a2)                           in-context learning rate
            v = v + (v_first - v) sigmoid(v0 + z_v v1 v2)         except in the first layer
            kk = k k_k / |k k_k|, then k = k (1 - k_a + a k_a)
            y = ln_x(wkv7(r, w, k, v, -kk, kk a)) + (r . k r_k) v
            out = Wo (y sigmoid(z_g g1) g2)
        """
        change = shift_tokens(x, state.time_mix_x, context) - x
        r = self.receptance(x + change * self.x_r)
        k = self.key(x + change * self.x_k)
        xv = x + change * self.x_v
        v = self.value(xv)

        w_lora = torch.tanh((x + change * self.x_w) @ self.w1) @ self.w2
        w = FASTEST_LOG_DECAY * torch.sigmoid(at_least_float32(self.w0) + w_lora)
        a = torch.sigmoid(self.a0 + (x + change * self.x_a) @ self.a1 @ self.a2)
        g = torch.sigmoid((x + change * self.x_g) @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2).to(v.dtype))

        heads = (*x.shape[:2], self.n_head, self.head_size)  # B, T, H, N
        kk = F.normalize((k * self.k_k).view(heads), dim=-1)
        k = (k * torch.addcmul(1 - self.k_a, a, self.k_a)).to(r.dtype)
        r, w, k, v_heads, a = (tensor.view(heads) for tensor in (r, w, k, v, a))
        y, wkv = wkv7(
            r,
            w,
            k,
            v_heads,
            -kk.to(r.dtype),
            (kk * a).to(r.dtype),
            state.wkv,
            context,
            backend=self.wkv_backend,
        )
        current = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v_heads
        y = (self.ln_x(y) + current.flatten(2)) * g  # the norm made it float32; the projection takes it back
        return (
            self.output(y.to(r.dtype)),
            LayerState(last_token(x, state.time_mix_x, context), wkv, state.channel_mix_x),
            v_first,
        )

    def zero_wkv(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the recurrence's state before any token, ``[B, H, N, N]``."""
        return wkv7_zero_state(batch_size, self.n_head, self.head_size, device, dtype)


class ChannelMix(nn.Module):
    """Two-layer MLP with a squared ReLU on a token-shifted input (the "ffn" of a checkpoint)."""

    def __init__(self, config: Rwkv7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.ffn_width, bias=False)
        self.value = nn.Linear(config.ffn_width, config.n_embd, bias=False)

    def forward(self, x: Tensor, state: LayerState, context: SequenceContext) -> tuple[Tensor, LayerState]:
        """Mix channels; see :class:`rwkv_train.models.block.ChannelMix`."""
        change = shift_tokens(x, state.channel_mix_x, context) - x
        hidden = relu_squared(self.key(x + change * self.x_k))  # [B, T, F]
        return self.value(hidden), LayerState(
            state.time_mix_x, state.wkv, last_token(x, state.channel_mix_x, context)
        )


def embedding_scale(config: Rwkv7Config) -> float:
    """Return the bound of the initial embeddings."""
    return 1e-4


def initial_values(config: Rwkv7Config, layer_index: int, generator: Generator) -> dict[str, Tensor]:
    """Return one layer's published initial values in float32, by parameter name within the block."""
    C, H, N, ranks = config.n_embd, config.n_head, config.head_size, config.ranks
    r01, r10 = layer_ratios(layer_index, config.n_layer)
    d = channel_ratios(C)
    vectors = _revised_vectors if config.initialization == "revised" else _original_vectors
    shared = {
        "x_r": 1 - d.pow(0.2 * r10),
        "x_w": 1 - d.pow(0.9 * r10),
        "x_a": 1 - d.pow(0.9 * r10),
        "x_g": 1 - d.pow(0.2 * r10),
    }
    att = {
        name: value.expand(C).view(1, 1, C) for name, value in (shared | vectors(config, r01, r10)).items()
    }
    for name, rank in ranks.model_dump().items():
        att[f"{name}1"] = torch.zeros(C, rank)  # so each low-rank pair starts as its bias alone
        att[f"{name}2"] = orthogonal(rank, C, generator, 0.1 * gain_of_shape(rank, C))
    att |= {
        "r_k": att["r_k"].view(H, N),
        "receptance.weight": orthogonal(C, C, generator),
        "key.weight": orthogonal(C, C, generator, 0.1),
        "value.weight": orthogonal(C, C, generator),
        "output.weight": torch.zeros(C, C),  # each block starts as the identity
        "ln_x.weight": torch.full((C,), ((1 + layer_index) / config.n_layer) ** 0.7),
        "ln_x.bias": torch.zeros(C),
    }
    ffn = {
        "x_k": (1 - d.pow(r10**4)).view(1, 1, C),
        "key.weight": orthogonal(config.ffn_width, C, generator),
        "value.weight": torch.zeros(C, config.ffn_width),
    }
    return {f"att.{name}": value for name, value in att.items()} | {
        f"ffn.{name}": value for name, value in ffn.items()
    }


def _revised_vectors(config: Rwkv7Config, r01: float, r10: float) -> dict[str, Tensor]:
    """Return what the initial values since May 2025 changed: each ``[C]`` or one number for all channels."""
    C, N = config.n_embd, config.head_size
    d = channel_ratios(C)
    linear = full_channel_ratios(C) - 0.5
    half = max((N - 1) / 2, 0.5)  # a head of one channel has no spread: 0, not 0 / 0
    z = (torch.arange(C, device="cpu") % N - (N - 1) / 2) / half
    zigzag = z * z.abs()  # within each head from -1 to 1, flat in the middle
    return {
        "x_k": 1 - d.pow(0.7 * r10),
        "x_v": 1 - d.pow(0.7 * r10),
        "w0": -6 + 6 * full_channel_ratios(C).pow(1 + r01**0.3) + 0.5 + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "v0": 0.73 - 0.4 * linear,
        "k_k": 0.71 - 0.1 * linear,
        "k_a": torch.tensor(1.02),
        "r_k": torch.tensor(-0.04),
    }


def _original_vectors(config: Rwkv7Config, r01: float, r10: float) -> dict[str, Tensor]:
    """Return the same vectors as the released weights were trained from."""
    d = channel_ratios(config.n_embd)
    return {
        "x_k": 1 - (d.pow(0.9 * r10) + 0.4 * r01),
        "x_v": 1 - (d.pow(0.4 * r10) + 0.6 * r01),
        "w0": -7 + 5 * full_channel_ratios(config.n_embd).pow(0.85 + r01**0.5) + 0.5,
        "a0": torch.tensor(0.0),
        "v0": torch.tensor(1.0),
        "k_k": torch.tensor(0.85),
        "k_a": torch.tensor(1.0),
        "r_k": torch.tensor(0.0),
    }
