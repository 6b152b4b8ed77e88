"""RWKV-5 "Eagle": a matrix state for each head, a decay that does not depend on the text.

Names in a checkpoint: ``time_mix_*`` is how much of the current token (not of the one before) a projection
sees; ``time_decay`` is the log of the negative log decay; ``time_faaaa`` weighs the current token, or
``time_first`` by its exponential. Version 5.2 has a decay and a bonus for each channel, 5.0 and 5.1 for each head,
and 5.0 has no gate. The channel mix is that of RWKV-4.

Source:
    Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892;
    initial values of 5.2 from RWKV-LM, ``RWKV-v5/src/model.py``.
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rwkv_train.config.model import EagleFinchConfig, Rwkv5Config
from rwkv_train.models.layers import (
    HeadNorm,
    at_least_float32,
    channel_ratios,
    full_channel_ratios,
    last_token,
    layer_ratios,
    orthogonal,
    shift_tokens,
)
from rwkv_train.models.state import LayerState
from rwkv_train.ops.context import SequenceContext
from rwkv_train.ops.wkv5 import wkv5, wkv5_zero_state

LEARNING_RATE_FACTORS: Mapping[str, float] = {"att.time_decay": 2.0, "att.time_first": 3.0}
"""End of a parameter's name -> factor of its learning rate; every other parameter has 1."""

UNUSED_PARAMETERS: frozenset[str] = frozenset()
"""Parameters of the published files that take no part in the result."""


class TimeMix(nn.Module):
    """Heads that add values under keys to a matrix state, which decays (the "att" of a checkpoint)."""

    def __init__(self, config: Rwkv5Config, layer_index: int, wkv_backend: str) -> None:
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        self.wkv_backend = wkv_backend
        has_gate = config.version != "5.0"
        owners = (H, N) if config.version == "5.2" else (H,)  # of a decay and a bonus
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_g = nn.Parameter(torch.empty(1, 1, C)) if has_gate else None
        self.time_decay = nn.Parameter(torch.empty(owners))
        self.time_faaaa = nn.Parameter(torch.empty(owners)) if config.bonus == "time_faaaa" else None
        self.time_first = nn.Parameter(torch.empty(owners)) if config.bonus == "time_first" else None
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False) if has_gate else None
        self.ln_x = HeadNorm(C, head_norm_eps(config))

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Mix tokens; see :class:`rwkv_train.models.block.TimeMix`.

        With ``z_j = x m_j + x_prev (1 - m_j)`` for each projection ``j``::

            w = -exp(time_decay)                                  log decay
            y = ln_x(wkv5(r, w, k, v, u))
            out = Wo (y silu(Wg z_g))                             without the gate in 5.0
        """
        previous = shift_tokens(x, state.time_mix_x, context)
        change = x - previous
        heads = (*x.shape[:2], self.n_head, self.head_size)  # B, T, H, N
        k = self.key(previous + change * self.time_mix_k).view(heads)
        v = self.value(previous + change * self.time_mix_v).view(heads)
        r = self.receptance(previous + change * self.time_mix_r).view(heads)
        w = self._of_each_channel(-torch.exp(at_least_float32(self.time_decay)))
        u = self._of_each_channel(self._bonus())

        y, wkv = wkv5(r, w, k, v, u, state.wkv, context, backend=self.wkv_backend)
        y = self.ln_x(y)  # the norm made it float32; the projection takes it back
        if self.gate is not None and self.time_mix_g is not None:
            y = y * F.silu(self.gate(previous + change * self.time_mix_g))
        return (
            self.output(y.to(r.dtype)),
            LayerState(last_token(x, state.time_mix_x, context), wkv, state.channel_mix_x),
            v_first,
        )

    def zero_wkv(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the recurrence's state before any token, ``[B, H, N, N]``."""
        return wkv5_zero_state(batch_size, self.n_head, self.head_size, device, dtype)

    def _bonus(self) -> Tensor:
        if self.time_faaaa is not None:
            return self.time_faaaa
        assert self.time_first is not None
        return torch.exp(at_least_float32(self.time_first))

    def _of_each_channel(self, x: Tensor) -> Tensor:
        """Return ``[H, N]``, also where ``x`` is ``[H]``."""
        return x.view(self.n_head, -1).expand(self.n_head, self.head_size)


def head_norm_eps(config: EagleFinchConfig) -> float:
    """Return the epsilon for undivided heads that is 1e-5 for divided ones, as published."""
    return 1e-5 * config.head_size_divisor**2


def embedding_scale(config: EagleFinchConfig) -> float:
    """Return the bound of the initial embeddings."""
    return 1e-4


def initial_values(config: Rwkv5Config, layer_index: int, generator: Generator) -> dict[str, Tensor]:
    """Return one layer's published initial values in float32, by parameter name within the block."""
    r01, r10 = layer_ratios(layer_index, config.n_layer)
    d = channel_ratios(config.n_embd)
    mix_k = d.pow(r10).view(1, 1, -1)
    mix_r = d.pow(0.5 * r10).view(1, 1, -1)
    return {
        "att.time_mix_k": mix_k,
        "att.time_mix_v": mix_k + 0.3 * r01,
        "att.time_mix_r": mix_r,
        "att.time_mix_g": mix_r,
        "ffn.time_mix_k": mix_k,
        "ffn.time_mix_r": mix_k,
    } | shared_initial_values(config, layer_index, generator)


def shared_initial_values(
    config: EagleFinchConfig, layer_index: int, generator: Generator
) -> dict[str, Tensor]:
    """Return what RWKV-5.2 and RWKV-6 have in common: decay, bonus, matrices and the norm of the heads."""
    C, H, N, F = config.n_embd, config.n_head, config.head_size, config.ffn_width
    r01, _ = layer_ratios(layer_index, config.n_layer)
    ratios = full_channel_ratios(C)
    zigzag = 0.1 * ((torch.arange(C, device="cpu") + 1) % 3 - 1)
    return {
        "att.time_decay": (-6 + 5 * ratios.pow(0.7 + 1.3 * r01)).view(H, N),
        "att.time_faaaa": (r01 * (1 - ratios) + zigzag).view(H, N),
        "att.receptance.weight": orthogonal(C, C, generator),
        "att.key.weight": orthogonal(C, C, generator, 0.1),
        "att.value.weight": orthogonal(C, C, generator),
        "att.gate.weight": orthogonal(C, C, generator, 0.1),
        "att.output.weight": torch.zeros(C, C),  # each block starts as the identity
        "att.ln_x.weight": torch.full((C,), ((1 + layer_index) / config.n_layer) ** 0.7),
        "att.ln_x.bias": torch.zeros(C),
        "ffn.key.weight": orthogonal(F, C, generator),
        "ffn.receptance.weight": torch.zeros(C, C),
        "ffn.value.weight": torch.zeros(C, F),
    }
