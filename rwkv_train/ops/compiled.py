"""What the compiled backends of a recurrence have in common, on a CPU as on a GPU.

Their sources know packed rows only: S sequences in one, of which ``cu_seqlens`` says where they start. A plain batch of
B rows is one of B sequences of the same length. Checkpoints are states, ``[T // G + S, *one state]`` for T tokens in
all and G from one kept state to the next: those of sequence s begin at ``cu_seqlens[s] // G + s``. So each has room and
knows its place without the lengths of the others, and the shape does not depend on where sequences start.
"""

import ctypes
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Signature(NamedTuple):
    """How the source of a recurrence takes its tensors."""

    op: str
    """Name of the operator, which is also that of its source."""
    inputs: tuple[str, ...]
    """Names of its tensors in the order of the source, the last one ``"state"``."""
    n_sizes: int
    """Number of sizes of a token of ``v``."""
    checkpoint_tokens: int
    """Tokens from one kept state to the next; the source says the same, which loading checks."""
    shared: Collection[str] = ()
    """Names of the inputs that have no row for each token. The source leaves a row of their gradient for each
    sequence, ``[S, *shape]``."""
    form: str = ""
    """Ending of the names of the functions of one form of forward and backward, where a source has several; the names
    without an ending are those of the form that fits best."""
    family: str = ""
    """Ending of the name of the function that says ``checkpoint_tokens``, which several forms may share."""
    checkpoint_dtype: torch.dtype = torch.float32
    dtype: torch.dtype | None = None
    """What the form reads and writes where it does not do so in float32; ``None`` for one that takes any dtype."""

    @property
    def value_index(self) -> int:
        """Where ``v`` stands among the inputs."""
        return self.inputs.index("v")

    def checkpoints_shape(self, *arguments: Any) -> tuple[int, ...]:
        """Return the shape of the checkpoints for ``(*inputs, cu_seqlens)``."""
        *given, state, _cu_seqlens = arguments
        batch, n_tokens = given[self.value_index].shape[:2]
        return batch * n_tokens // self.checkpoint_tokens + state.shape[0], *state.shape[1:]

    def gradient_shapes(self, like: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Return the shapes of the gradients that the source writes, for inputs (or what is of their shapes)."""
        n_sequences = like[-1].shape[0]
        return [
            (n_sequences, *x.shape) if name in self.shared else tuple(x.shape)
            for name, x in zip(self.inputs, like, strict=True)
        ]

    def finished(self, written: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Add up the rows of what all sequences share, and give each gradient the dtype of its input."""
        return tuple(
            (gradient.sum(0) if name in self.shared else gradient).to(x.dtype)
            for name, gradient, x in zip(self.inputs, written, like, strict=True)
        )

    def check(self, library: ctypes.CDLL) -> None:
        """Assert that the library keeps a state as often as Python makes room for one."""
        assert getattr(library, f"rwkv_{self.op}_checkpoint_tokens{self.family}")() == self.checkpoint_tokens


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Return where each tensor's data lies; ``None`` becomes a null pointer."""
    return [None if x is None else x.data_ptr() for x in tensors]
