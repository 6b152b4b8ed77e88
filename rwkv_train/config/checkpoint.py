"""When a run writes checkpoints, in files of what size, and which of them stay."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from rwkv_train.config.base import Config


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every_n_steps: PositiveInt = 500
    """Steps between two checkpoints; one more follows the last step."""
    every_n_minutes: PositiveFloat | None = None
    """Minutes between two checkpoints, besides those by steps; null: by steps alone."""
    keep_last: PositiveInt = 2
    """How many of the newest are kept; the one with the best validation loss is kept besides."""
    keep_every_n_steps: PositiveInt | None = None
    """A checkpoint whose step is a multiple of this is never removed; null: none is kept for its step."""
    max_file_gb: Annotated[PositiveFloat, Field(le=1e9)] = 4.0
    """Size above which tensors are spread over several files, in GB (1e9 bytes)."""

    @property
    def max_file_bytes(self) -> int:
        """``max_file_gb`` in bytes."""
        return max(1, round(self.max_file_gb * 1e9))
