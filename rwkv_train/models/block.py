"""One layer of a model, the same for every version."""

from typing import Protocol

import torch
from torch import Tensor, nn

from rwkv_train.models.state import LayerState
from rwkv_train.ops.context import SequenceContext

LAYER_NORM_EPS = 1e-5


class TimeMix(Protocol):
    """What mixes tokens over time (the "att" of a checkpoint); a module."""

    def __call__(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Return the output ``[B, T, C]``, the state after the last token and the first layer's values."""
        ...

    def zero_wkv(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the state of the recurrence before any token."""
        ...


class ChannelMix(Protocol):
    """What mixes the channels of a token and the one before it (the "ffn" of a checkpoint); a module."""

    def __call__(self, x: Tensor, state: LayerState, context: SequenceContext) -> tuple[Tensor, LayerState]:
        """Return the output ``[B, T, C]`` and the state after the last token."""
        ...


class Block(nn.Module):
    """Time mix, then channel mix, each normalized before and added to the residual stream.

    Args:
        n_embd: width of the residual stream (C).
        is_first: the first block also normalizes the embeddings, with its ``ln0``.
        att: the version's time mix.
        ffn: the version's channel mix.
        dropout: part of the residual stream that is set to zero in training, after each of the two mixes.
    """

    def __init__(
        self, n_embd: int, *, is_first: bool, att: TimeMix, ffn: ChannelMix, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(n_embd, eps=LAYER_NORM_EPS) if is_first else nn.Identity()
        self.ln1 = nn.LayerNorm(n_embd, eps=LAYER_NORM_EPS)
        self.ln2 = nn.LayerNorm(n_embd, eps=LAYER_NORM_EPS)
        self.n_embd = n_embd  # the shapes of parameters tell nothing while ZeRO-3 holds them in shards
        self.att = att
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Compute one layer.

        Args:
            x: the residual stream, ``[B, T, C]``.
            state: this layer's state before the first token.
            v_first: values of the first layer ``[B, T, C]``, for versions that reuse them; ``None`` in it.
            context: how the batch is cut into sequences.

        Returns:
            The residual stream, the state after the last token, and ``v_first`` for the next layer.
        """
        x = self.ln0(x)
        mixed, state, v_first = self.att(self.ln1(x), state, v_first, context)
        x = self.dropout(x + mixed)  # the sum, not the mix alone: as published
        mixed, state = self.ffn(self.ln2(x), state, context)
        return self.dropout(x + mixed), state, v_first

    def zero_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state before any token; ``dtype`` is that of the activations."""
        return LayerState(
            time_mix_x=torch.zeros(batch_size, self.n_embd, device=device, dtype=dtype),
            wkv=self.att.zero_wkv(batch_size, device, torch.promote_types(dtype, torch.float32)),
            channel_mix_x=torch.zeros(batch_size, self.n_embd, device=device, dtype=dtype),
        )
