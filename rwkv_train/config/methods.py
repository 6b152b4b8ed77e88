"""How a model is finetuned: which parameters there are to learn, its own or new ones."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rwkv_train.config.base import Config

Pattern = Annotated[str, Field(min_length=1)]
"""Names of parameters or layers as in a shell: * is any text, ? any character, [0-5] one of these."""

Quantization = Literal["none", "int8", "nf4"]
"""What the matrices of a frozen base are kept in."""


class FullMethod(Config):
    """Every parameter learns."""

    method: Literal["full"] = "full"
    lr_factors: dict[Pattern, PositiveFloat] = Field(default_factory=dict)
    """Factors of the learning rate by names of parameters ("blocks.0.*": 0.5); the last that fits counts."""


class FreezeMethod(Config):
    """A part of the model's own parameters learns."""

    method: Literal["freeze"]
    train: list[Pattern] = Field(default=["*"], min_length=1)
    """Names of the parameters that learn ("blocks.*.att.*", "head.*")."""
    frozen_layers: NonNegativeInt = 0
    """So many layers from the bottom, and the embedding with them, stay as they are."""
    lr_factors: dict[Pattern, PositiveFloat] = Field(default_factory=dict)
    """As of "full"."""

    @model_validator(mode="after")
    def _something_is_frozen(self) -> Self:
        if self.train == ["*"] and self.frozen_layers == 0:
            raise ValueError("'freeze' freezes nothing here; set train or frozen_layers, or method to 'full'")
        return self


class LoraMethod(Config):
    """Low-rank matrices beside linear layers learn, the model stays as it is."""

    method: Literal["lora"]
    variant: Literal["lora", "dora", "pissa", "miss"] = "lora"
    """Plain LoRA; DoRA, which learns lengths of columns too; PiSSA, which starts from the layer's largest singular
    values; MiSS, which learns one matrix of block sums."""
    rank: PositiveInt = 16
    """Rank of the matrices."""
    alpha: PositiveFloat = 32.0
    """The product is multiplied by alpha / rank. MiSS has no such factor."""
    rslora: bool = False
    """Multiply it by alpha / sqrt(rank) instead (rsLoRA), so that large ranks learn as fast."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Part of the input of the low-rank matrices that training sets to zero."""
    targets: list[Pattern] = Field(default=["*.att.*", "*.ffn.*"], min_length=1)
    """Names of the linear layers that get one ("blocks.*.att.key", "blocks.1?.ffn.*")."""
    rank_pattern: dict[Pattern, PositiveInt] = Field(default_factory=dict)
    """Other ranks by names of layers; the last that fits counts."""
    alpha_pattern: dict[Pattern, PositiveFloat] = Field(default_factory=dict)
    """Other values of alpha by names of layers; the last that fits counts."""
    lr_factors: dict[Pattern, PositiveFloat] = Field(default_factory=dict)
    """Factors of the learning rate by names of parameters ("*.lora_B.*": 16 is LoRA+); the last that fits counts."""
    quantize: Quantization = "none"
    """Keep the linear layers of the frozen model in 8 bits (int8) or 4 (nf4), which takes less memory."""

    @model_validator(mode="after")
    def _miss_has_no_scale(self) -> Self:
        if self.variant == "miss":
            given = self.model_fields_set & {"alpha", "alpha_pattern", "rslora"}
            if given:
                raise ValueError(f"{min(given)} changes nothing for the variant 'miss'; leave it out")
            if self.rank_pattern:
                raise ValueError("the variant 'miss' has one rank for all layers; leave rank_pattern out")
        return self

    @model_validator(mode="after")
    def _needs_the_weights_themselves(self) -> Self:
        if self.quantize != "none" and self.variant in ("pissa", "dora", "miss"):
            raise ValueError(
                f"variant {self.variant!r} needs the weights of the layers, which quantize {self.quantize!r} rounds; "
                "set variant to 'lora', or quantize to 'none'"
            )
        return self


class StateMethod(Config):
    """The state from which every conversation is read learns, the model stays as it is."""

    method: Literal["state"]
    quantize: Quantization = "none"
    """As of "lora"."""


class PrefixMethod(Config):
    """Vectors that are read before every conversation, in place of embedded tokens, learn."""

    method: Literal["prefix"]
    n_tokens: PositiveInt = 16
    """How many."""
    text: str | None = None
    """Begin with the embeddings of this text, repeated or cut to n_tokens; null: with those of random tokens."""
    quantize: Quantization = "none"
    """As of "lora"."""


Method = Annotated[
    FullMethod | FreezeMethod | LoraMethod | StateMethod | PrefixMethod, Discriminator("method")
]
"""The section ``finetune``."""
