"""The language model: embedding, blocks, head. It serves every version and does not know which one it has."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_train.config.model import ModelConfig
from rwkv_train.models.block import LAYER_NORM_EPS, Block
from rwkv_train.models.layers import at_least_float32
from rwkv_train.models.state import LayerState, ModelState
from rwkv_train.ops.context import PLAIN, SequenceContext


class LmOutput(NamedTuple):
    """What one call of a model gives: logits or losses, and the state to go on from."""

    logits: Tensor | None
    """Scores of the next token, ``[B, T, V]``; ``None`` where targets were given."""
    losses: Tensor | None
    """Loss of each target, ``[B, T]`` float32 in nats; ``None`` without targets."""
    state: ModelState
    """State after the last token."""


class Head(nn.Module):
    """Scores of every token, or the loss of a given one.

    The loss is computed here so that the module which owns the weight is the one that uses it: the logits
    need never leave it.
    """

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits, or losses where ``targets`` are given.

        Args:
            x: output of the last layer, normalized, ``[B, T, C]``.
            targets: ids of the tokens to predict, ``[B, T]``; -100 has loss 0.

        Returns:
            Logits ``[B, T, V]``; or the negative log-likelihood of each target in nats, ``[B, T]`` float32.
        """
        logits = F.linear(x, self.weight)
        if targets is None:
            return logits
        # A bfloat16 softmax over tens of thousands of tokens would lose the small differences it is about.
        scores = at_least_float32(logits).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), reduction="none").view_as(targets)


class LanguageModel(nn.Module):
    """An RWKV language model. Reading in parallel and token by token are the same call.

    Args:
        config: the settings of the model.
        blocks: its ``n_layer`` blocks, first to last.
    """

    def __init__(self, config: ModelConfig, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.head = Head(config.n_embd, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        targets: Tensor | None = None,
        context: SequenceContext = PLAIN,
    ) -> LmOutput:
        """Read tokens.

        Args:
            tokens: ids, ``[B, T]`` int64, T at least 1.
            state: what the model keeps of the tokens before these; ``None`` at the start of a text.
            targets: the tokens that follow, ``[B, T]``, where their losses are wanted instead of logits.
            context: how the batch is cut into sequences.
        """
        if state is None:
            state = self.zero_state(tokens.shape[0], device=tokens.device)
        x = self.emb(tokens)  # [B, T, C]
        v_first: Tensor | None = None
        after: list[LayerState] = []
        for block, before in zip(self.blocks, state, strict=True):
            x, layer_state, v_first = block(x, before, v_first, context)
            after.append(layer_state)
        scores = self.head(self.ln_out(x), targets)
        if targets is None:
            return LmOutput(logits=scores, losses=None, state=tuple(after))
        return LmOutput(logits=None, losses=scores, state=tuple(after))

    def zero_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """Return the state before any token.

        Args:
            batch_size: number of texts that are read side by side (B).
            device: where the state lies; by default where the embedding does.
            dtype: dtype of the activations; by default that of the embedding. The recurrence's own state is
                float32 (float64 in a float64 model).
        """
        place = self.emb.weight.device if device is None else torch.device(device)
        kind = self.emb.weight.dtype if dtype is None else dtype
        return tuple(
            block.zero_state(batch_size, place, kind) for block in cast("Iterable[Block]", self.blocks)
        )
