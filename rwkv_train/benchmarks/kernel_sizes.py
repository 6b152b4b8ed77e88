"""The problems that recurrences are timed on, and the short labels that name them."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rwkv_train.errors import ConfigError
from rwkv_train.ops.prepare import OPERATORS

NO_HEADS = "wkv4"

_LABEL = re.compile(r"B(\d+)T(\d+)(?:H(\d+)N(\d+)|C(\d+))(-packed)?")


class KernelSize(NamedTuple):
    """A problem to time. ``wkv4`` has no heads: there ``H`` is 1 and ``N`` the width."""

    op: str
    B: int
    T: int
    H: int
    N: int
    packed: bool = False
    """All tokens in one row, in sequences each half as long as the one before, down to one token."""

    @property
    def label(self) -> str:
        """The size without its operator, as :func:`choose_sizes` takes it: ``B8T4096H32N64`` or ``B8T4096C2048``."""
        width = f"C{self.H * self.N}" if self.op == NO_HEADS else f"H{self.H}N{self.N}"
        return f"B{self.B}T{self.T}{width}{'-packed' if self.packed else ''}"

    @property
    def starts(self) -> list[int]:
        """Where sequences start in all tokens, and at the end the number of tokens."""
        n_tokens = self.B * self.T
        if not self.packed:
            return list(range(0, n_tokens + 1, self.T))
        starts = [0]
        while starts[-1] < n_tokens:
            starts.append(starts[-1] + (n_tokens - starts[-1] + 1) // 2)
        return starts


CPU_SIZES = (
    KernelSize("wkv7", B=4, T=512, H=12, N=64),
    KernelSize("wkv7", B=4, T=512, H=12, N=64, packed=True),
    KernelSize("wkv7", B=12, T=64, H=2, N=64),
    KernelSize("wkv6", B=4, T=512, H=12, N=64),
    KernelSize("wkv6", B=4, T=512, H=12, N=64, packed=True),
    KernelSize("wkv6", B=12, T=64, H=2, N=64),
    KernelSize("wkv5", B=4, T=512, H=12, N=64),
    KernelSize("wkv5", B=4, T=512, H=12, N=64, packed=True),
    KernelSize("wkv5", B=12, T=64, H=2, N=64),
    KernelSize("wkv4", B=4, T=512, H=1, N=768),
    KernelSize("wkv4", B=4, T=512, H=1, N=768, packed=True),
    KernelSize("wkv4", B=12, T=64, H=1, N=128),
)

GPU_SIZES = (
    # What a model of 1.5 billion parameters makes of a full batch; and one long text in a small model: few heads.
    KernelSize("wkv7", B=8, T=4096, H=32, N=64),
    KernelSize("wkv7", B=8, T=4096, H=32, N=64, packed=True),
    KernelSize("wkv7", B=8, T=4096, H=16, N=128),
    KernelSize("wkv7", B=1, T=32768, H=12, N=64),
    KernelSize("wkv6", B=8, T=4096, H=32, N=64),
    KernelSize("wkv6", B=8, T=4096, H=16, N=128),
    KernelSize("wkv6", B=1, T=32768, H=12, N=64),
    KernelSize("wkv5", B=8, T=4096, H=32, N=64),
    KernelSize("wkv5", B=8, T=4096, H=16, N=128),
    KernelSize("wkv5", B=1, T=32768, H=12, N=64),
    KernelSize("wkv4", B=8, T=4096, H=1, N=2048),
    KernelSize("wkv4", B=8, T=4096, H=1, N=2048, packed=True),
    KernelSize("wkv4", B=1, T=32768, H=1, N=768),
    *CPU_SIZES,
)


def standard_sizes(device_type: str) -> tuple[KernelSize, ...]:
    """Return what is timed on ``"cpu"`` or ``"cuda"`` where nobody says otherwise."""
    return GPU_SIZES if device_type == "cuda" else CPU_SIZES


def choose_sizes(
    device_type: str, ops: Sequence[str] | None = None, labels: Sequence[str] | None = None
) -> tuple[KernelSize, ...]:
    """Return the standard sizes, or those of some operators, or sizes of one's own.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``; decides the standard sizes.
        ops: names of operators; all if ``None``.
        labels: sizes that stand in for the standard ones, for each of ``ops``: ``B8T4096H32N64``, with ``-packed``
            after it for one row of sequences; ``wkv4`` takes C = H N channels, also written ``B8T4096C2048``, which
            is for ``wkv4`` alone. The standard ones if ``None``.

    Raises:
        ConfigError: there is no such operator, or a label is not of this form, or fits none of ``ops``.
    """
    for op in ops or ():
        if op not in OPERATORS:
            raise ConfigError(f"--op {op}: there is no such operator; choose one of {', '.join(OPERATORS)}")
    if labels is None:
        return tuple(size for size in standard_sizes(device_type) if not ops or size.op in ops)
    chosen = [size for label in labels for size in _parse(label, ops)]
    return tuple(dict.fromkeys(chosen))


def _parse(label: str, ops: Sequence[str] | None) -> Iterator[KernelSize]:
    match = _LABEL.fullmatch(label)
    numbers = [int(number) for number in match.groups()[:5] if number] if match else []
    if not match or 0 in numbers:
        raise ConfigError(
            f"--size {label}: wanted B8T4096H32N64 (B rows of T tokens, H heads of N channels), for wkv4 also "
            f"B8T4096C2048, and -packed after it for sequences in one row"
        )
    B, T, *width = numbers
    packed = match[6] is not None
    for op in ops or tuple(reversed(OPERATORS)):
        if op == NO_HEADS:
            yield KernelSize(op, B, T, 1, math.prod(width), packed)
        elif len(width) == 2:
            yield KernelSize(op, B, T, width[0], width[1], packed)
        elif ops:
            raise ConfigError(
                f"--size {label} is for {NO_HEADS}, which has no heads; {op} wants H and N in place of C"
            )
