"""The language model: embedding, blocks, head. It serves every version and does not know which one it has."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_train.config.model import ModelConfig
from rwkv_train.models.block import LAYER_NORM_EPS, Block
from rwkv_train.models.start import Start
from rwkv_train.models.state import LayerState, ModelState
from rwkv_train.ops.context import PLAIN, SequenceContext, count_sequences
from rwkv_train.ops.cross_entropy import linear_cross_entropy

NO_TARGET = -100
"""Stands for a target that is not to be predicted: PyTorch's own value."""


class LmOutput(NamedTuple):
    """What one call of a model gives: logits or losses, and the state to go on from."""

    logits: Tensor | None
    """Scores of the next token, ``[B, T, V]``; ``None`` where targets were given."""
    losses: Tensor | None
    """Loss of each target, ``[B, T]`` float32 in nats; ``None`` without targets."""
    state: ModelState
    """State after the last token."""
    penalties: Tensor | None = None
    """Half the square of each token's largest logit, ``[B, T]`` float32; ``None`` where not asked for."""


class Head(nn.Module):
    """Scores of every token, or the loss of a given one.

    The loss is computed here so that the module which owns the weight is the one that uses it: the logits
    need never leave it.
    """

    recompute_logits: bool
    """Whether the backward of losses computes logits again, also where they are few enough to be kept."""

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__()
        self.recompute_logits = False
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd))

    def forward(
        self, x: Tensor, targets: Tensor | None = None, with_penalty: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits, or losses where ``targets`` are given.

        Args:
            x: output of the last layer, normalized, ``[B, T, C]``.
            targets: ids of the tokens to predict, ``[B, T]``; -100 has loss and penalty 0.
            with_penalty: also return the penalties of L2Wrap; needs targets.

        Returns:
            Logits ``[B, T, V]`` and ``None``; or the negative log-likelihood of each target in nats and half the
            square of the largest logit, or ``None``, both ``[B, T]`` float32.
        """
        if targets is None:
            return F.linear(x, self.weight), None
        return linear_cross_entropy(
            x,
            self.weight,
            targets,
            ignore_index=NO_TARGET,
            with_penalty=with_penalty,
            keep_logits=not self.recompute_logits,
        )


class LanguageModel(nn.Module):
    """An RWKV language model. Reading in parallel and token by token are the same call.

    Args:
        config: the settings of the model.
        blocks: its ``n_layer`` blocks, first to last.
        dropout: part of the embeddings that is set to zero in training.
    """

    recompute_blocks: bool
    """Whether a backward computes each block again from its input instead of keeping what is inside it."""
    start: Start | None
    """What every text is read from; ``None``: the empty state."""

    draws_random_numbers: bool
    """Whether blocks draw random numbers in training, which computing them again must draw again."""

    def __init__(self, config: ModelConfig, blocks: Iterable[Block], dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        self.draws_random_numbers = dropout > 0
        # From a tensor, as the other constructor draws random numbers; where there is no memory yet, that loads the
        # compiler of PyTorch, which takes a second.
        weight = torch.empty(config.vocab_size, config.n_embd)
        self.emb = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.head = Head(config.n_embd, config.vocab_size)
        self.register_module("start", None)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        targets: Tensor | None = None,
        context: SequenceContext = PLAIN,
        with_penalty: bool = False,
    ) -> LmOutput:
        """Read tokens.

        Args:
            tokens: ids, ``[B, T]`` int64, T at least 1.
            state: what the model keeps of the tokens before these; ``None`` at the start of a text, which is read
                from :meth:`initial_state`.
            targets: the tokens that follow, ``[B, T]``, where their losses are wanted instead of logits.
            context: how the batch is cut into sequences. Of a packed row, ``[1, T]``, the state is that of each of
                its S sequences, ``[S, ...]``.
            with_penalty: beside the losses also return the penalties of L2Wrap.

        Raises:
            ValueError: the context does not fit the tokens or the state.
        """
        if state is None:
            state = self.initial_state(count_sequences(context, tokens.shape[0]), device=tokens.device)
        x, after = self.run_blocks(self.dropout(self.emb(tokens)), state, context)
        scores, penalties = self.head(self.ln_out(x), targets, with_penalty)
        if targets is None:
            return LmOutput(logits=scores, losses=None, state=after)
        return LmOutput(logits=None, losses=scores, state=after, penalties=penalties)

    def run_blocks(
        self, x: Tensor, state: ModelState, context: SequenceContext = PLAIN
    ) -> tuple[Tensor, ModelState]:
        """Let all blocks read vectors.

        Args:
            x: the vectors of tokens, as the embedding has them, ``[B, T, C]``.
            state: what the model keeps of what stands before them.
            context: how the batch is cut into sequences.

        Returns:
            The residual stream after the last block, ``[B, T, C]``, and the state after the last vector.
        """
        v_first: Tensor | None = None
        after: list[LayerState] = []
        for block, before in zip(self.blocks, state, strict=True):
            if self.recompute_blocks and torch.is_grad_enabled():
                x, layer_state, v_first = checkpoint(
                    block,
                    x,
                    before,
                    v_first,
                    context,
                    use_reentrant=False,
                    preserve_rng_state=self.draws_random_numbers,
                )
            else:
                x, layer_state, v_first = block(x, before, v_first, context)
            after.append(layer_state)
        return x, tuple(after)

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """Return the state that texts are read from: the empty one, or what :attr:`start` gives.

        A start that learns gets its gradient through this state.

        Args:
            batch_size: number of texts that are read side by side (B), or that stand in a packed row (S).
            device: as for :meth:`zero_state`.
            dtype: likewise.
        """
        if self.start is None:
            return self.zero_state(batch_size, device, dtype)
        return tuple(
            LayerState(
                *(
                    # A copy, also of one row: what is read from here must not change as the start learns.
                    x.to(like).expand(batch_size, *x.shape[1:]).clone(memory_format=torch.contiguous_format)
                    for x, like in zip(one, empty, strict=True)
                )
            )
            for one, empty in zip(self.start(self), self.zero_state(0, device, dtype), strict=True)
        )

    def zero_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """Return the empty state: nothing was read, nothing was learned.

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
