"""The recurrent memory of a model: what it must keep of all tokens it has read."""

from typing import NamedTuple

from torch import Tensor


class LayerState(NamedTuple):
    """Memory of one block. A tuple, not a dataclass, because DeepSpeed's hooks walk tuples only."""

    time_mix_x: Tensor
    """Last input of the time mix, ``[B, C]``, in the dtype of the activations."""
    wkv: Tensor
    """State of the recurrence, float32: ``[B, 3, C]`` for RWKV-4, ``[B, H, N, N]`` (value, key) for RWKV-7."""
    channel_mix_x: Tensor
    """Last input of the channel mix, ``[B, C]``, in the dtype of the activations."""


ModelState = tuple[LayerState, ...]
"""Memory of a model, one entry for each block."""
