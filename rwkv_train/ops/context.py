"""How the rows of a batch are cut into sequences."""

from typing import NamedTuple


class SequenceContext(NamedTuple):
    """One immutable value a batch, handed to every mix and every operator.

    A tuple, not a dataclass, because PyTorch 2.11 cannot compile a function that makes one of those.

    It says where sequences start. Today there is one kind, the plain batch: each of the B rows is one
    sequence, which goes on from the state that is passed with it.
    """


PLAIN = SequenceContext()
"""Every row of the batch is one sequence."""
