"""RWKV-6 "Finch": RWKV-5.2 with a token shift and a decay that depend on the text.

Names in a checkpoint: ``time_maa_*`` is how much of the previous token (not of the current one) a projection sees;
``time_maa_w1`` and ``time_maa_w2`` are low-rank pairs that change it from token to token, for the decay, key,
value, receptance and gate in this order; ``time_decay`` is the log of the negative log decay, to which the pair
``time_decay_w1``, ``time_decay_w2`` adds; ``time_faaaa`` weighs the current token.

Source:
    Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892;
    initial values from RWKV-LM, ``RWKV-v5/src/model.py`` (x060).
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rwkv_train.config.model import Rwkv6Config
from rwkv_train.models.layers import (
    HeadNorm,
    at_least_float32,
    channel_ratios,
    last_token,
    layer_ratios,
    relu_squared,
    shift_tokens,
    uniform,
)
from rwkv_train.models.rwkv5 import head_norm_eps, shared_initial_values
from rwkv_train.models.state import LayerState
from rwkv_train.ops.context import SequenceContext
from rwkv_train.ops.wkv6 import wkv6, wkv6_zero_state

LEARNING_RATE_FACTORS: Mapping[str, float] = {"att.time_decay": 2.0}
"""End of a parameter's name -> factor of its learning rate; every other parameter has 1."""

UNUSED_PARAMETERS: frozenset[str] = frozenset()
"""Parameters of the published files that take no part in the result."""

N_SHIFTED = 5
"""Inputs whose token shift depends on the text: those of decay, key, value, receptance and gate."""


class TimeMix(nn.Module):
    """Heads that add values under keys to a matrix state, which decays (the "att" of a checkpoint)."""

    def __init__(self, config: Rwkv6Config, layer_index: int, wkv_backend: str) -> None:
        super().__init__()
        C, H, N, ranks = config.n_embd, config.n_head, config.head_size, config.lora_ranks
        self.n_head, self.head_size = H, N
        self.shift_rank = ranks.shift
        self.wkv_backend = wkv_backend
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, N_SHIFTED * ranks.shift))
        self.time_maa_w2 = nn.Parameter(torch.empty(N_SHIFTED, ranks.shift, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, ranks.decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(ranks.decay, C))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.ln_x = HeadNorm(C, head_norm_eps(config))

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Mix tokens; see :class:`rwkv_train.models.block.TimeMix`.

        With ``z = x + (x_prev - x) maa_x`` and ``z_j = x + (x_prev - x) (maa_j + tanh(z w1_j) w2_j)`` for each
        projection ``j``::

            w = -exp(time_decay + tanh(z_w decay_w1) decay_w2)    log decay
            y = ln_x(wkv6(r, w, k, v, time_faaaa))
            out = Wo (y silu(Wg z_g))
        """
        change = shift_tokens(x, state.time_mix_x, context) - x
        low = torch.tanh((x + change * self.time_maa_x) @ self.time_maa_w1)  # [B, T, 5 R]
        low = low.view(*x.shape[:2], N_SHIFTED, self.shift_rank)
        mw, mk, mv, mr, mg = torch.einsum("btjr,jrc->jbtc", low, self.time_maa_w2).unbind()

        heads = (*x.shape[:2], self.n_head, self.head_size)  # B, T, H, N
        w_lora = torch.tanh((x + change * (self.time_maa_w + mw)) @ self.time_decay_w1) @ self.time_decay_w2
        w = -torch.exp(at_least_float32(self.time_decay) + w_lora).view(heads)
        k = self.key(x + change * (self.time_maa_k + mk)).view(heads)
        v = self.value(x + change * (self.time_maa_v + mv)).view(heads)
        r = self.receptance(x + change * (self.time_maa_r + mr)).view(heads)
        g = F.silu(self.gate(x + change * (self.time_maa_g + mg)))

        y, wkv = wkv6(r, w, k, v, self.time_faaaa, state.wkv, context, backend=self.wkv_backend)
        y = self.ln_x(y) * g  # the norm made it float32; the projection takes it back
        return (
            self.output(y.to(r.dtype)),
            LayerState(last_token(x, state.time_mix_x, context), wkv, state.channel_mix_x),
            v_first,
        )

    def zero_wkv(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the recurrence's state before any token, ``[B, H, N, N]``."""
        return wkv6_zero_state(batch_size, self.n_head, self.head_size, device, dtype)


class ChannelMix(nn.Module):
    """Two-layer MLP with a squared ReLU and a gate, on token-shifted inputs (the "ffn" of a checkpoint)."""

    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__()
        C, F = config.n_embd, config.ffn_width
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, F, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor, state: LayerState, context: SequenceContext) -> tuple[Tensor, LayerState]:
        """Mix channels; see :class:`rwkv_train.models.block.ChannelMix`."""
        change = shift_tokens(x, state.channel_mix_x, context) - x
        hidden = relu_squared(self.key(x + change * self.time_maa_k))  # [B, T, F]
        gate = torch.sigmoid(self.receptance(x + change * self.time_maa_r))
        return gate * self.value(hidden), LayerState(
            state.time_mix_x, state.wkv, last_token(x, state.channel_mix_x, context)
        )


def initial_values(config: Rwkv6Config, layer_index: int, generator: Generator) -> dict[str, Tensor]:
    """Return one layer's published initial values in float32, by parameter name within the block."""
    C, ranks = config.n_embd, config.lora_ranks
    r01, r10 = layer_ratios(layer_index, config.n_layer)
    d = channel_ratios(C)
    maa_k = 1 - d.pow(r10).view(1, 1, C)
    maa_r = 1 - d.pow(0.5 * r10).view(1, 1, C)
    ffn_maa = 1 - d.pow(r10**3).view(1, 1, C)
    shared = shared_initial_values(config, layer_index, generator)
    pairs = N_SHIFTED * ranks.shift
    return shared | {
        "att.time_maa_x": maa_k,
        "att.time_maa_w": maa_k,
        "att.time_maa_k": maa_k,
        "att.time_maa_v": maa_k - 0.3 * r01,
        "att.time_maa_r": maa_r,
        "att.time_maa_g": maa_r,
        "att.time_maa_w1": torch.zeros(C, pairs),  # so nothing depends on the text at first
        "att.time_maa_w2": uniform(pairs, C, 0.01, generator).view(N_SHIFTED, ranks.shift, C),
        "att.time_decay": shared["att.time_decay"].view(1, 1, C),
        "att.time_decay_w1": torch.zeros(C, ranks.decay),
        "att.time_decay_w2": uniform(ranks.decay, C, 0.01, generator),
        "ffn.time_maa_k": ffn_maa,
        "ffn.time_maa_r": ffn_maa,
    }
