"""Architecture settings: one class for each RWKV version, told apart by ``arch``."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from rwkv_train.config.base import Config

LoraRule = Literal["original", "revised"]
"""The two published formulas for LoRA ranks; see :func:`lora_ranks_by_rule`."""

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Part of something that training sets to zero."""


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

    @property
    def why_not_from_scratch(self) -> str | None:
        """Why a model with these settings has no initial values, beginning with a setting; ``None``: it has."""
        return None

    def explicit(self) -> Self:
        """Return these settings as they are stored beside weights: nothing left to a rule, no ``init_from``."""
        return self.model_copy(update={"init_from": None})


class Rwkv4Config(RwkvConfig):
    """RWKV-4 "Dove": a vector state for each channel."""

    arch: Literal["rwkv4"] = "rwkv4"
    embedding_scale: PositiveFloat = 6e-4
    """Initial embeddings are uniform within plus and minus this; published: the learning rate."""
    dropout: Dropout = 0.0
    """Part of the residual stream that training sets to zero, after the embedding and both mixes of each block."""

    @property
    def version(self) -> str:
        """The version's number."""
        return "4"

    @property
    def n_head(self) -> int | None:
        """Number of heads (H): it has none."""
        return None

    @property
    def head_size(self) -> int | None:
        """Channels in one head (N): it has none."""
        return None

    @property
    def ffn_width(self) -> int:
        """Hidden width of the channel mix (F)."""
        return 4 * self.n_embd

    @property
    def low_ranks(self) -> dict[str, int]:
        """It has no low-rank pairs."""
        return {}


class MatrixStateConfig(RwkvConfig):
    """Settings of the versions with a matrix state for each head."""

    head_size: PositiveInt = 64
    """Channels in one head (N)."""

    @property
    def n_head(self) -> int:
        """Number of heads (H)."""
        return self.n_embd // self.head_size

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> Self:
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of head_size ({self.head_size})")
        return self


def _published_ffn_width(settings: dict[str, Any]) -> int:
    """3.5 times the width, rounded down to a multiple of 32, at least 32."""
    n_embd: int = settings["n_embd"]
    return max(32, 7 * n_embd // 2 // 32 * 32)


class EagleFinchConfig(MatrixStateConfig):
    """Settings that RWKV-5 "Eagle" and RWKV-6 "Finch" share."""

    head_size_divisor: PositiveFloat = 8.0
    """Heads are divided by this before their norm (epsilon 1e-5), which is the same as an epsilon times its square."""
    ffn_width: PositiveInt = Field(default_factory=_published_ffn_width)
    """Hidden width of the channel mix (F); published: 3.5 n_embd, rounded down to a multiple of 32."""
    dropout: Dropout = 0.0
    """Part of the residual stream that training sets to zero, after the embedding and both mixes of each block."""


def _as_text(value: object) -> object:
    """YAML reads a version that is not quoted as a number."""
    return str(value) if isinstance(value, float) else value


class Rwkv5Config(EagleFinchConfig):
    """RWKV-5 "Eagle": a matrix state for each head, a decay that does not depend on the text."""

    arch: Literal["rwkv5"] = "rwkv5"
    version: Annotated[Literal["5.0", "5.1", "5.2"], BeforeValidator(_as_text)] = "5.2"
    """Each channel of 5.2 has its own decay; 5.0 and 5.1 have one for each head, and 5.0 has no gate."""
    bonus: Literal["time_faaaa", "time_first"] = "time_faaaa"
    """Tensor that weighs the current token: by its value (time_faaaa), or by its exponential (only 5.0 and 5.1)."""

    @property
    def low_ranks(self) -> dict[str, int]:
        """It has no low-rank pairs."""
        return {}

    @property
    def why_not_from_scratch(self) -> str | None:
        """Why a model with these settings has no initial values, beginning with a setting; ``None``: it has."""
        if self.version == "5.2":
            return None
        return (
            f"version is '{self.version}', but initial values are published for '5.2'; train that, or start from "
            "weights with model.init_from"
        )

    @model_validator(mode="after")
    def _the_bonus_belongs_to_the_version(self) -> Self:
        if self.version == "5.2" and self.bonus != "time_faaaa":
            raise ValueError(f"bonus is '{self.bonus}', but version '5.2' has 'time_faaaa'")
        return self


class Rwkv6Ranks(Config):
    """Inner widths of RWKV-6's low-rank projections."""

    shift: PositiveInt = 32
    """Rank of each of the five projections of the token shift; published: 32, or 64 where n_embd is 4096."""
    decay: PositiveInt = 64
    """Rank of the decay projection; published: 64, or 128 where n_embd is 4096."""


class Rwkv6Config(EagleFinchConfig):
    """RWKV-6 "Finch": RWKV-5 with a token shift and a decay that depend on the text."""

    arch: Literal["rwkv6"] = "rwkv6"
    lora_ranks: Rwkv6Ranks = Rwkv6Ranks()
    """Ranks {shift, decay}."""

    @property
    def version(self) -> str:
        """The version's number."""
        return "6"

    @property
    def low_ranks(self) -> dict[str, int]:
        """Inner widths of the low-rank projections by name."""
        return self.lora_ranks.model_dump()


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
    Annotated[LoraRanks, Tag("four ranks")] | Annotated[LoraRule, Tag("rule")],
    Discriminator(lambda value: "rule" if isinstance(value, str) else "four ranks"),
]


class Rwkv7Config(MatrixStateConfig):
    """RWKV-7 "Goose": a matrix state for each head, edited by a rule that depends on the text."""

    arch: Literal["rwkv7"] = "rwkv7"
    lora_ranks: RanksOrRule = "revised"
    """Ranks {w, a, v, g}, or a published rule: "original" (2024, released weights) or "revised" (2025-07)."""
    initialization: Literal["original", "revised"] = "revised"
    """Published initial values: "revised" (since 2025-05) or "original" (before, the released weights)."""

    @property
    def version(self) -> str:
        """The version's number."""
        return "7"

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

    @property
    def low_ranks(self) -> dict[str, int]:
        """Inner widths of the low-rank projections by name."""
        return self.ranks.model_dump()

    def explicit(self) -> Self:
        """Return these settings as they are stored beside weights: nothing left to a rule, no ``init_from``."""
        return self.model_copy(update={"init_from": None, "lora_ranks": self.ranks})


ModelConfig = Annotated[Rwkv4Config | Rwkv5Config | Rwkv6Config | Rwkv7Config, Field(discriminator="arch")]


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
