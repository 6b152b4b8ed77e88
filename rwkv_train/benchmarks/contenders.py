"""Who is measured at one size, and what one call of each gives and takes beside its time."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.benchmarks.kernel_counts import FORWARD
from rwkv_train.benchmarks.kernel_inputs import KernelInputs
from rwkv_train.benchmarks.kernel_peers import Peer
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv5 import wkv5
from rwkv_train.ops.wkv6 import wkv6
from rwkv_train.ops.wkv7 import wkv7

RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "wkv4": wkv4,
    "wkv5": wkv5,
    "wkv6": wkv6,
    "wkv7": wkv7,
}

Call = Callable[[], tuple[Tensor, ...]]
"""Returns y, or with a backward the gradients of the inputs."""


class Contender(NamedTuple):
    """A backend of ours, or a peer, with its inputs."""

    name: str
    is_ours: bool
    run: Callable[[], Tensor]
    """Returns y."""


class Look(NamedTuple):
    """What a call gives and takes, beside its time."""

    result: tuple[Tensor, ...]
    peak_bytes: int | None
    """Memory beyond what was taken before the call; ``None`` on a CPU."""


def backend_contender(op: str, backend: str, inputs: KernelInputs) -> Contender:
    """Return a backend of ours that runs on some inputs."""

    def run() -> Tensor:
        return RECURRENCES[op](*inputs.tensors, None, inputs.context, backend=backend)[0]

    return Contender(backend, True, run)


def peer_contender(peer: Peer, inputs: KernelInputs) -> Contender:
    """Return a peer that runs on some inputs."""
    cu_seqlens = inputs.context.cu_seqlens
    options = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    return Contender(peer.name, False, lambda: peer.function(*inputs.tensors, **options)[0])


def make_call(contender: Contender, kind: str, inputs: KernelInputs) -> Call:
    """Return a call of one pass, of ``PASSES``."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (contender.run(),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(contender.run(), inputs.tensors, inputs.dy)

    return forward if kind == FORWARD else forward_and_backward


def look_at(call: Call, device: torch.device) -> Look:
    """Call once, and see what it gives and how much memory it takes."""
    if device.type != "cuda":
        return Look(call(), None)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return Look(result, torch.cuda.max_memory_allocated(device) - before)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a call failed for want of memory; torch's CPU allocator has no class of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def keep_values(inputs: KernelInputs) -> list[Tensor]:
    """Return copies of all tensors that a peer can get hold of."""
    return [x.detach().clone() for x in _within_reach(inputs)]


def restore_values(inputs: KernelInputs, kept: Sequence[Tensor]) -> bool:
    """Undo what a peer did to the inputs that all share; return whether it did anything.

    Values are compared, not the counts of changes that torch keeps: those miss what a kernel writes on its own.
    """
    changed = [
        (x, old) for x, old in zip(_within_reach(inputs), kept, strict=True) if not torch.equal(x, old)
    ]
    for x, old in changed:
        x.data = old
    return bool(changed)


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the relative difference of that pair of tensors which differs most.

    Returns:
        The norm of the difference over the norm of what was expected, computed in float32; NaN if any is NaN.

    Raises:
        ValueError: the shapes differ.
    """
    for x, y in zip(found, expected, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"a result has the shape {tuple(x.shape)}, wanted {tuple(y.shape)}")
    differences = [_relative_difference(x, y) for x, y in zip(found, expected, strict=True)]
    return max(
        differences, key=lambda difference: (math.isnan(difference), difference)
    )  # max() skips a later NaN


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    error = float(torch.linalg.vector_norm(found.float() - expected.float()))
    norm = float(torch.linalg.vector_norm(expected, dtype=torch.float32))
    return error / norm if norm else error  # of one token, the decay has no gradient


def _within_reach(inputs: KernelInputs) -> list[Tensor]:
    cu_seqlens = inputs.context.cu_seqlens
    return [*inputs.tensors, inputs.dy, *([] if cu_seqlens is None else [cu_seqlens])]
