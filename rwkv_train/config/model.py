"""Architecture settings: one class for each RWKV version, told apart by ``arch``."""

import math
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from rwkv_train.config.base import Config

LoraRule = Literal["original", "revised"]
"""The two published formulas for LoRA ranks; see :func:`lora_ranks_by_rule`."""


class RwkvConfig(Config):
    """Settings that every version has."""

    n_layer: Annotated[PositiveInt, Field(le=1_000)]
    """Number of blocks (L)."""
    n_embd: PositiveInt
    """Width of the residual stream (C)."""
    vocab_size: PositiveInt = 65_536
    """Number of token ids (V); at least that of the tokenizer."""
    ctx_len: PositiveInt = 4_096
    """Tokens in one training sample (T). Inference has no limit."""
    init_from: str | None = None
    """Start from these weights: a path, or hf:OWNER/NAME/FILE, which give the sizes; null: from scratch."""


class Rwkv4Config(RwkvConfig):
    """RWKV-4 "Dove": a vector state for each channel."""

    arch: Literal["rwkv4"] = "rwkv4"
    embedding_scale: PositiveFloat = 6e-4
    """Initial embeddings are uniform within plus and minus this; published: the learning rate."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Part of the residual stream that training sets to zero, after the embedding and both mixes of each block."""

    @property
    def ffn_width(self) -> int:
        """Hidden width of the channel mix (F)."""
        return 4 * self.n_embd


class LoraRanks(Config):
    """Inner widths of RWKV-7's low-rank projections."""

    w: PositiveInt
    """Rank of the decay projection."""
    a: PositiveInt
    """Rank of the in-context learning rate projection."""
    v: PositiveInt
    """Rank of the value residual projection."""
    g: PositiveInt
    """Rank of the gate projection."""


RanksOrRule = Annotated[
    Annotated[LoraRanks, Tag("ranks")] | Annotated[LoraRule, Tag("rule")],
    Discriminator(lambda value: "rule" if isinstance(value, str) else "ranks"),
]


class Rwkv7Config(RwkvConfig):
    """RWKV-7 "Goose": a matrix state for each head."""

    arch: Literal["rwkv7"] = "rwkv7"
    head_size: PositiveInt = 64
    """Channels in one head (N)."""
    lora_ranks: RanksOrRule = "revised"
    """Ranks {w, a, v, g}, or a published rule: "original" (2024, released weights) or "revised" (2025-07)."""
    initialization: Literal["original", "revised"] = "revised"
    """Published initial values: "revised" (since 2025-05) or "original" (before, the released weights)."""

    @property
    def n_head(self) -> int:
        """Number of heads (H)."""
        return self.n_embd // self.head_size

    @property
    def ffn_width(self) -> int:
        """Hidden width of the channel mix (F)."""
        return 4 * self.n_embd

    @property
    def ranks(self) -> LoraRanks:
        """The four ranks, computed by the rule where one is named."""
        if isinstance(self.lora_ranks, LoraRanks):
            return self.lora_ranks
        return lora_ranks_by_rule(self.n_embd, self.lora_ranks)

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> Self:
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of head_size ({self.head_size})")
        return self


ModelConfig = Annotated[Rwkv4Config | Rwkv7Config, Field(discriminator="arch")]


def lora_ranks_by_rule(n_embd: int, rule: LoraRule) -> LoraRanks:
    """Compute RWKV-7's LoRA ranks from the width, by one of the two published rules.

    Each rank is ``factor * n_embd ** power`` rounded to a multiple of 32, at least 32.

    Args:
        n_embd: width of the residual stream (C).
        rule: ``"original"`` (2024, the era of the released weights, some of which still differ from it) or
            ``"revised"`` (the reference trainer since 2025-07).

    Source:
        RWKV-LM, ``RWKV-v5/src/model.py`` (original) and ``RWKV-v7/train_temp/src/model.py`` (revised).
    """

    def rank(factor: float, power: float) -> int:
        return max(32, round(factor * math.pow(n_embd, power) / 32) * 32)

    if rule == "original":
        return LoraRanks(w=rank(1.8, 0.5), a=rank(1.8, 0.5), v=rank(1.3, 0.5), g=rank(0.6, 0.8))
    return LoraRanks(w=rank(2.5, 0.5), a=rank(2.5, 0.5), v=rank(1.7, 0.5), g=rank(5.0, 0.5))
