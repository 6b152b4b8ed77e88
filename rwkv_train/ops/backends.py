"""Which implementation of an operator runs: a pure choice, and the loading that follows it.

An operator has a table of backends, fastest first. The choice sees a :class:`Problem`, not tensors, so what
a GPU would get can be tested on a laptop. Loading (a compiled backend is built on first use) happens once,
before the first step; the code that is traced afterwards calls only ``torch.ops.rwkv_train.*``.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.errors import BackendError

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The name that lets us choose. Every other name is a backend that runs or raises."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


class Problem(NamedTuple):
    """All that a choice of backend may depend on. Lengths and batch sizes do not matter to it."""

    device_type: str
    """``"cpu"`` or ``"cuda"``, as in ``torch.device.type``."""
    dtype: torch.dtype
    """Dtype of the values ``v``, which is also that of the output."""
    head_size: int | None = None
    """Channels in one head (N); ``None`` for an operator without heads."""
    is_packed: bool = False
    """Whether one row holds several sequences."""
    capability: int | None = None
    """Of a CUDA device its compute capability, 86 for sm_86; ``None`` for another device, or where it is unknown."""


def problem_of(v: Tensor, head_size: int | None, *, is_packed: bool) -> Problem:
    """Return the problem that an operator has with these values; safe to trace."""
    return Problem(v.device.type, v.dtype, head_size, is_packed, capability_of(v.device))


def capability_of(device: torch.device) -> int | None:
    """Return the compute capability of a CUDA device, 86 for sm_86.

    ``None`` for any other device, of which CUDA is not asked, and where no CUDA device can be asked.
    """
    return _cuda_capability(device.index) if device.type == "cuda" else None


# Traced code asks once, while it is traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_capability(index: int | None) -> int | None:
    if not torch.cuda.is_available():  # as with tensors that only show what would be computed elsewhere
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


class Backend(NamedTuple):
    """One row of an operator's table."""

    refuses: Callable[[Problem], str | None]
    """Pure: why this backend cannot run the problem ("it needs ..."), or ``None``."""
    load: Callable[[], object]
    """Make it ready (build a library, say); raises :class:`BackendError` where it cannot be had here."""
    run: Kernel
    """The kernel, with the operator's tensor arguments and then cu_seqlens or ``None``; safe to trace. (What is
    not registered with PyTorch, like ``reference``, can be traced with a plain batch only.)"""


class ResolvedBackend(NamedTuple):
    """What a choice came to."""

    name: str
    reason: str
    """One sentence for the log: why this one, and why none of the faster ones."""


def choose_backend(
    backends: Mapping[str, Backend],
    problem: Problem,
    name: str,
    unavailable: Mapping[str, str] | None = None,
) -> ResolvedBackend:
    """Choose the backend that runs a problem. Pure: nothing is loaded and no machine is looked at.

    Args:
        backends: the operator's table, fastest first.
        problem: what is to be computed.
        name: a name from the table, or ``"auto"`` for the first that does not refuse.
        unavailable: names that could not be loaded, each with its sentence; ``"auto"`` passes them over.

    Raises:
        BackendError: there is no backend of this name, it refuses, or (for ``"auto"``) all refuse.
    """
    unavailable = unavailable or {}
    if name == AUTO:
        passed_over: list[str] = []
        for candidate, backend in backends.items():
            why_not = unavailable.get(candidate) or backend.refuses(problem)
            if why_not is None:
                return ResolvedBackend(candidate, _explain(candidate, passed_over))
            passed_over.append(f"not {candidate}: {why_not}")
        raise BackendError(f"no backend can run this problem ({'; '.join(passed_over)})")
    if name not in backends:
        names = ", ".join((AUTO, *backends))
        raise BackendError(f"there is no backend '{name}'; choose one of {names}")
    why_not = unavailable.get(name) or backends[name].refuses(problem)
    if why_not is not None:
        raise BackendError(f"the backend '{name}' cannot run this problem: {why_not}")
    return ResolvedBackend(name, f"'{name}' was asked for by name")


def resolve_backend(backends: Mapping[str, Backend], problem: Problem, name: str) -> ResolvedBackend:
    """Choose a backend and load it. Only ``"auto"`` goes on to the next one where loading fails.

    Raises:
        BackendError: as :func:`choose_backend`, or the backend asked for by name cannot be loaded.
    """
    unavailable: dict[str, str] = {}
    while True:
        choice = choose_backend(backends, problem, name, unavailable)
        try:
            backends[choice.name].load()
        except BackendError as error:
            if name != AUTO:
                raise
            logger.warning("the backend '%s' is passed over: %s", choice.name, error)
            unavailable[choice.name] = str(error)
        else:
            return choice


def register_operator(op: str, backends: Mapping[str, Backend]) -> None:
    """Make an operator's table known by the operator's name; its module does so when it is imported."""
    _TABLES[op] = backends


def prepare(op: str, problem: Problem, name: str) -> ResolvedBackend:
    """Choose and load (where needed build) an operator's backend; ``"auto"`` chooses once a process.

    Raises:
        BackendError: ``name`` cannot run the problem, or cannot be loaded on this machine.
    """
    return _resolve_auto(op, problem) if name == AUTO else resolve_backend(_TABLES[op], problem, name)


def kernel_for(op: str, problem: Problem, name: str) -> Kernel:
    """Return the kernel that runs a problem; safe to trace, ``"auto"`` too.

    Raises:
        BackendError: ``name`` cannot run the problem.
    """
    if name == AUTO:
        name = _auto_name(op, *problem)
    else:
        choose_backend(_TABLES[op], problem, name)
    return _TABLES[op][name].run


_TABLES: dict[str, Mapping[str, Backend]] = {}


# Traced code asks once, while it is traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _auto_name(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    head_size: int | None,
    is_packed: bool,
    capability: int | None,
) -> str:
    return _resolve_auto(op, Problem(device_type, dtype, head_size, is_packed, capability)).name


@functools.cache
def _resolve_auto(op: str, problem: Problem) -> ResolvedBackend:
    return resolve_backend(_TABLES[op], problem, AUTO)


def _explain(name: str, passed_over: list[str]) -> str:
    if not passed_over:
        return f"'{name}' is the fastest backend"
    return f"'{name}' is the fastest backend that can run here ({'; '.join(passed_over)})"
