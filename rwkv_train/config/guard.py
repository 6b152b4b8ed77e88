"""What a run does about a step that went wrong."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rwkv_train.config.base import Config


class GuardConfig(Config):
    """A step is bad when its gradient is not finite or its loss leaps; it never changes the weights."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    """"stop" the run, "skip" the batch, or go back to the last checkpoint ("rollback") and on with other data."""
    loss_spike: Annotated[float, Field(gt=1.0)] | None = None
    """A loss above this many times the median of the last ones is bad; null: only what is not finite is."""
    window: PositiveInt = 100
    """Steps that the median and the number of bad steps are taken over."""
    max_bad_steps: NonNegativeInt = 5
    """Bad steps that "skip" and "rollback" (since its checkpoint too) put up with in a window; one more stops."""
