"""The optimizer (AdamW) and the learning rate over time."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from rwkv_train.config.base import Config

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Config):
    """Adam as the published trainers use it, with decoupled weight decay on the matrices."""

    lr: PositiveFloat = 6e-4
    """Highest learning rate, reached at the end of the warm-up."""
    lr_final: PositiveFloat = 6e-5
    """Learning rate at the end of the run, which the step after the last would have."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the learning rate rises from 1 % to 100 % of lr."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes from lr to lr_final; "constant" needs lr_final equal to lr."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of the matrices; every other parameter has none."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    beta1: Beta = 0.9
    """Decay of Adam's first moment."""
    beta2: Beta = 0.99
    """Decay of Adam's second moment."""
    eps: PositiveFloat = 1e-18
    """Added to the root of Adam's second moment."""

    @model_validator(mode="after")
    def _final_is_not_above(self) -> Self:
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final ({self.lr_final:g}) must not be above lr ({self.lr:g})")
        if self.schedule == "constant" and self.lr_final != self.lr:
            raise ValueError(
                f"schedule 'constant' needs lr_final ({self.lr_final:g}) equal to lr ({self.lr:g}); set both"
            )
        return self
