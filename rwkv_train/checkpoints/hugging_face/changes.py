"""How a tensor of a Hugging Face folder is made of ours, and ours of it: no bit is lost on either way.

Every function works on tensors without values (device "meta") too, so shapes are found by the same code.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_R_W_K_V_G = (3, 0, 1, 2, 4)
"""Places of r, w, k, v, g in the official order w, k, v, r, g."""

_W_K_V_R_G = (1, 2, 3, 0, 4)
"""Places of w, k, v, r, g in flash-linear-attention's order r, w, k, v, g."""


class Change(NamedTuple):
    """Two functions that undo each other."""

    write: Callable[[Sequence[Tensor]], Tensor]
    """Makes their tensor of ours, which come in the order of the table."""
    read: Callable[[Tensor, int], Tensor]
    """Makes ours of theirs; the number is its place in the table's row."""


SAME = Change(lambda ours: ours[0], lambda theirs, place: theirs)
"""The same values in the same order."""

TRANSPOSED = Change(lambda ours: ours[0].T, lambda theirs, place: theirs.T)
"""``[in, out]`` of a low-rank pair to ``[out, in]`` of a linear layer."""

FLAT = Change(lambda ours: ours[0].reshape(-1), lambda theirs, place: theirs.reshape(1, 1, -1))
"""``[1, 1, C]`` to ``[C]``."""

STACKED = Change(
    lambda ours: torch.cat([one.reshape(1, -1) for one in ours]),
    lambda theirs, place: theirs[place].reshape(1, 1, -1),
)
"""Several ``[1, 1, C]`` to one ``[n, C]``."""

SHIFT_DOWN = Change(
    lambda ours: torch.unflatten(ours[0], 1, (5, -1))[:, _R_W_K_V_G].flatten(1).T,
    lambda theirs, place: torch.unflatten(theirs.T, 1, (5, -1))[:, _W_K_V_R_G].flatten(1),
)
"""RWKV-6's ``time_maa_w1`` ``[C, 5 R]``, five blocks of columns, to ``[5 R, C]`` in the other order."""

SHIFT_UP = Change(
    lambda ours: ours[0][_R_W_K_V_G, :].flatten(0, 1).T,
    lambda theirs, place: torch.unflatten(theirs.T, 0, (5, -1))[_W_K_V_R_G, :],
)
"""RWKV-6's ``time_maa_w2`` ``[5, R, C]`` to ``[C, 5 R]`` in the other order."""
