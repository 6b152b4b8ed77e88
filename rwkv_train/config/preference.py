"""Learning from pairs of answers, of which one is preferred."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from rwkv_train.config.base import Config

_ONLY_OF: dict[str, tuple[str, Any]] = {
    "label_smoothing": ("dpo", 0.0),
    "gamma": ("simpo", 0.5),
    "chosen_weight": ("dpo", 0.0),
}
"""Settings that one loss has -> that loss and the value where nothing is set; under any other they are None."""


class PreferenceConfig(Config):
    """The loss on pairs."""

    loss: Literal["dpo", "orpo", "simpo"] = "dpo"
    """DPO compares with the model before the run; ORPO and SimPO need no such reference."""
    beta: PositiveFloat
    """DPO and SimPO: steepness of the preference; ORPO: weight of the odds ratio beside the chosen answer's loss; 0.1
    if not set, for SimPO 2."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = None
    """Only with "dpo": part of the pairs that are taken to be the wrong way round; 0 if not set."""
    chosen_weight: NonNegativeFloat | None = None
    """Only with "dpo": weight of the chosen answers' own loss beside it; 0 if not set."""
    gamma: NonNegativeFloat | None = None
    """Only with "simpo": margin by which the chosen answer's mean log-probability, times beta, is to be above; 0.5 if
    not set."""

    @model_validator(mode="before")
    @classmethod
    def _fill_own(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        loss = values.get("loss", "dpo")
        own: dict[str, Any] = {"beta": 2.0 if loss == "simpo" else 0.1}
        own |= {name: value for name, (owner, value) in _ONLY_OF.items() if owner == loss}
        return own | {name: value for name, value in values.items() if value is not None or name not in own}

    @model_validator(mode="after")
    def _own_only(self) -> Self:
        for name, (owner, _) in _ONLY_OF.items():
            if self.loss != owner and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} ({getattr(self, name):g}) does nothing with the loss {self.loss!r}; leave it out, or set "
                    f"loss to {owner!r}"
                )
        return self
