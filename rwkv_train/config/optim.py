"""The optimizer (AdamW), the loss' penalty, and the learning rate and weight decay over time."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from rwkv_train.config.base import Config

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PartOfOne = Annotated[float, Field(gt=0.0, le=1.0)]

_WSD_DEFAULTS: dict[str, Any] = {"wsd_decay_fraction": 0.2, "wsd_decay": "linear"}
"""Settings of the schedule "wsd"; under any other they are None."""


class OptimConfig(Config):
    """Adam as the published trainers use it, with decoupled weight decay on the matrices."""

    implementation: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW: PyTorch's fused one, or DeepSpeed's, compiled at the start; the latter under DeepSpeed only."""
    lr: PositiveFloat = 6e-4
    """Highest learning rate, reached at the end of the warm-up."""
    lr_final: PositiveFloat = 6e-5
    """Learning rate at the end of the run, which the step after the last would have."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the learning rate rises from warmup_start to all of the schedule's."""
    warmup_start: PartOfOne = 0.01
    """Part of the learning rate at the first step of the warm-up; published for RWKV-4: 0.2."""
    schedule: Literal["cosine", "linear", "exponential", "wsd", "constant"] = "cosine"
    """How the learning rate goes from lr to lr_final; "wsd" stays at lr first; "constant" needs lr_final = lr."""
    wsd_decay_fraction: PartOfOne | None = None
    """Only with "wsd": part of the run, at its end, in which the learning rate falls; 0.2 if not set."""
    wsd_decay: Literal["linear", "cosine", "exponential", "sqrt"] | None = None
    """Only with "wsd": the shape of that fall; "linear" if not set; "sqrt" falls with 1 - sqrt(progress)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of the matrices; every other parameter has none."""
    weight_decay_final: PositiveFloat | None = None
    """Weight decay at the end of the run, reached exponentially from the end of the warm-up on; null: no change."""
    l2wrap: NonNegativeFloat = 1e-4
    """Factor of the penalty on each token's largest logit (half its square, averaged): L2Wrap; 0: none."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    beta1: Beta = 0.9
    """Decay of Adam's first moment."""
    beta2: Beta = 0.99
    """Decay of Adam's second moment."""
    eps: PositiveFloat = 1e-18
    """Added to the root of Adam's second moment."""

    @model_validator(mode="before")
    @classmethod
    def _fill_wsd(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("schedule") != "wsd":
            return values
        given = {
            name: value for name, value in values.items() if value is not None or name not in _WSD_DEFAULTS
        }
        return _WSD_DEFAULTS | given

    @model_validator(mode="after")
    def _wsd_only(self) -> Self:
        for name in _WSD_DEFAULTS:
            if self.schedule != "wsd" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) does nothing under schedule '{self.schedule}'; leave it out "
                    "(or null), or set schedule to 'wsd'"
                )
        return self

    @model_validator(mode="after")
    def _final_is_not_above(self) -> Self:
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final ({self.lr_final:g}) must not be above lr ({self.lr:g})")
        if self.schedule == "constant" and self.lr_final != self.lr:
            raise ValueError(
                f"schedule 'constant' needs lr_final ({self.lr_final:g}) equal to lr ({self.lr:g}); set both"
            )
        return self

    @model_validator(mode="after")
    def _decay_can_change(self) -> Self:
        if self.weight_decay_final is not None and self.weight_decay == 0:
            raise ValueError(
                f"weight_decay_final ({self.weight_decay_final:g}) cannot be reached exponentially from "
                "weight_decay 0; set weight_decay above 0, or weight_decay_final to null"
            )
        return self
