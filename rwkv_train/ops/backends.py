"""Which implementation of an operator runs: a pure choice, and the loading that follows it.

An operator has a table of backends, in the usual order of their speed. The choice sees a :class:`Problem` and the
speeds that were measured on its chip (:mod:`rwkv_train.ops.crossover`), not tensors, so what a GPU would get can be
tested on a laptop. Loading (a compiled backend is built on first use) happens once, before the first step; the code
that is traced afterwards calls only ``torch.ops.rwkv_train.*``.
"""

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_train.errors import BackendError
from rwkv_train.ops.chip import capability_of, chip_name
from rwkv_train.ops.crossover import (
    COMMITTED_FOLDER,
    FORWARD,
    FORWARD_BACKWARD,
    NEVER_MEASURED,
    Case,
    Chip,
    Speeds,
    find_tables,
    look_up,
    power_of_two_near,
    user_folder,
    warn_of_unmeasured,
)
from rwkv_train.ops.tracing import constant_when_traced

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The name that lets us choose. Every other name is a backend that runs or raises."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


class Problem(NamedTuple):
    """All that a choice of backend may depend on.

    Sizes are powers of two, so that there are few problems: each is chosen for once a process.
    """

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
    chip: str | None = None
    """Name of the device; ``None`` where it is unknown."""
    n_recurrences: int | None = None
    """Sequences times heads (B H), without heads sequences times channels (B C): the power of two near to it. ``None``
    where it is unknown, as in a graph that is traced for many sizes."""
    n_tokens: int | None = None
    """Tokens of a sequence (T), of a packed row the mean: the power of two near to it. ``None`` likewise."""
    needs_backward: bool = False
    """Whether a backward pass follows."""


def problem_of(
    v: Tensor, head_size: int | None, *, is_packed: bool, n_sequences: int | None = None
) -> Problem:
    """Return the problem that an operator has with these values; safe to trace.

    Args:
        v: values, ``[B, T, H, N]``, without heads ``[B, T, C]``.
        head_size: channels in one head (N), ``None`` for an operator without heads.
        is_packed: whether the one row holds several sequences.
        n_sequences: how many there are, empty ones too; those of a plain batch (B) if ``None``.
    """
    batch, n_tokens, width = v.shape[:3]
    n_sequences = batch if n_sequences is None else n_sequences
    n_recurrences = mean_tokens = None
    if not _any_open(batch, n_tokens, width, n_sequences):
        n_recurrences = power_of_two_near(n_sequences * width)
        mean_tokens = power_of_two_near(batch * n_tokens // max(1, n_sequences))
    return Problem(
        v.device.type,
        v.dtype,
        head_size,
        is_packed,
        capability_of(v.device),
        chip_name(v.device),
        n_recurrences,
        mean_tokens,
        torch.is_grad_enabled() and v.requires_grad,
    )


def _any_open(*sizes: int) -> bool:
    """Tell whether a graph is being traced for any value of a size; to look at it would settle it for one."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # noqa: PLC0415 - slow to import

        return not all(has_static_value(size) for size in sizes)
    return torch.SymInt in map(type, sizes)


class Backend(NamedTuple):
    """One row of an operator's table."""

    refuses: Callable[[Problem], str | None]
    """Pure: why this backend cannot run the problem ("it needs ..."), or ``None``."""
    load: Callable[[], object]
    """Make it ready (build a library, say); raises :class:`BackendError` where it cannot be had here."""
    run: Kernel
    """The kernel, with the operator's tensor arguments and then cu_seqlens or ``None``; safe to trace. (What is
    not registered with PyTorch, like ``reference``, can be traced with a plain batch only.)"""
    in_auto: bool = True
    """Whether ``"auto"`` may choose it. What buys speed with precision is for those who ask for it by name."""


class ResolvedBackend(NamedTuple):
    """What a choice came to."""

    name: str
    reason: str
    """One sentence for the log: why this one, by which measured times, and why none that stands before it."""


NOTHING_MEASURED = Speeds({}, "no speeds were measured")


def choose_backend(
    backends: Mapping[str, Backend],
    problem: Problem,
    name: str,
    unavailable: Mapping[str, str] | None = None,
    speeds: Speeds = NOTHING_MEASURED,
) -> ResolvedBackend:
    """Choose the backend that runs a problem. Pure: nothing is loaded and no machine is looked at.

    Args:
        backends: the operator's table, in the usual order of speed.
        problem: what is to be computed.
        name: a name from the table, or ``"auto"``: of those that do not refuse the fastest that was measured, where
            none was the first of the table.
        unavailable: names that could not be loaded, each with its sentence; ``"auto"`` passes them over.
        speeds: what was measured of problems like this.

    Raises:
        BackendError: there is no backend of this name, it refuses, or (for ``"auto"``) all refuse.
    """
    unavailable = unavailable or {}
    if name == AUTO:
        return _choose_fastest(backends, problem, unavailable, speeds)
    if name not in backends:
        names = ", ".join((AUTO, *backends))
        raise BackendError(f"there is no backend '{name}'; choose one of {names}")
    why_not = unavailable.get(name) or backends[name].refuses(problem)
    if why_not is not None:
        raise BackendError(f"the backend '{name}' cannot run this problem: {why_not}")
    return ResolvedBackend(name, f"'{name}' was asked for by name")


def _choose_fastest(
    backends: Mapping[str, Backend], problem: Problem, unavailable: Mapping[str, str], speeds: Speeds
) -> ResolvedBackend:
    why_not = {
        name: unavailable.get(name) or backend.refuses(problem)
        for name, backend in backends.items()
        if backend.in_auto
    }
    runnable = [name for name, reason in why_not.items() if reason is None]
    if not runnable:
        refusals = "; ".join(f"not {name}: {reason}" for name, reason in why_not.items())
        raise BackendError(f"no backend can run this problem ({refusals})")
    times = speeds.milliseconds
    measured = sorted((name for name in runnable if name in times), key=times.__getitem__)
    chosen = measured[0] if measured else runnable[0]
    before = list(why_not)[: list(why_not).index(chosen)]
    notes = [f"not {name}: {why_not[name]}" for name in before if why_not[name] is not None]
    if measured:
        notes += [
            f"{name} was not measured there" for name in before if why_not[name] is None and name not in times
        ]
        return ResolvedBackend(chosen, _explain_measured(measured, speeds, notes))
    here = f" that can run here ({'; '.join(notes)})" if notes else ""
    return ResolvedBackend(chosen, f"'{chosen}' is the first in the usual order{here}; {speeds.said}")


def _explain_measured(measured: Sequence[str], speeds: Speeds, notes: Sequence[str]) -> str:
    times = ", ".join(f"{name} {speeds.milliseconds[name]:.3g} ms" for name in measured)
    return f"'{measured[0]}' is the fastest by measurement ({'; '.join((times, speeds.said, *notes))})"


def resolve_backend(
    backends: Mapping[str, Backend], problem: Problem, name: str, speeds: Speeds = NOTHING_MEASURED
) -> ResolvedBackend:
    """Choose a backend and load it. Only ``"auto"`` goes on to the next one where loading fails.

    Raises:
        BackendError: as :func:`choose_backend`, or the backend asked for by name cannot be loaded.
    """
    return _resolve(backends, problem, name, speeds, {})


def _resolve(
    backends: Mapping[str, Backend],
    problem: Problem,
    name: str,
    speeds: Speeds,
    unavailable: dict[str, str],
) -> ResolvedBackend:
    """Do so; what cannot be loaded is added to ``unavailable``."""
    while True:
        choice = choose_backend(backends, problem, name, unavailable, speeds)
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
        # A graph takes in what is made of constants; a step of generation comes by here for every layer.
        is_traced = torch.compiler.is_compiling()
        name = _auto_name(op, *problem) if is_traced else _resolve_auto(op, problem).name
    else:
        choose_backend(_TABLES[op], problem, name)
    return _TABLES[op][name].run


def speeds_for(op: str, problem: Problem) -> Speeds:
    """Return what the tables of this machine and of this package say of an operator's speeds for a problem."""
    chip = None if problem.chip is None else Chip(problem.chip, problem.capability)
    folders = [COMMITTED_FOLDER]
    with suppress(BackendError):  # a user without a home has no tables
        folders.insert(0, user_folder())
    tables = () if chip is None else find_tables(chip, tuple(folders))
    return look_up(tables, chip, _case_of(op, problem), problem.n_recurrences, problem.n_tokens)


def newer_backends(
    backends: Mapping[str, Backend], problem: Problem, unavailable: Collection[str], speeds: Speeds
) -> list[str]:
    """Return what ``"auto"`` passes over only because it did not run when the problem's case was measured. Pure.

    What ran then and has no time at this size is not among them: it does not fit into memory there, or is wrong, and
    would be again. Where no backend that can run was measured the order of the table decides, and passes over none.

    Args:
        backends: the operator's table.
        problem: what is to be computed.
        unavailable: names that could not be loaded.
        speeds: what was measured of problems like this.
    """
    runnable = [
        name
        for name, backend in backends.items()
        if backend.in_auto and name not in unavailable and backend.refuses(problem) is None
    ]
    if speeds.milliseconds.keys().isdisjoint(runnable):
        return []
    known = {NEVER_MEASURED, *speeds.milliseconds, *speeds.backends}
    return [name for name in runnable if name not in known]


def _case_of(op: str, problem: Problem) -> Case:
    dtype = str(problem.dtype).removeprefix("torch.")
    return Case(op, problem.head_size, dtype, FORWARD_BACKWARD if problem.needs_backward else FORWARD)


_TABLES: dict[str, Mapping[str, Backend]] = {}
_UNAVAILABLE: dict[str, dict[str, str]] = {}
"""Name of an operator -> its backends that ``"auto"`` could not load: each is tried once, not for every problem."""


# Traced code asks once, while it is traced.
@constant_when_traced
def _auto_name(op: str, *fields: Any) -> str:
    return _resolve_auto(op, Problem(*fields)).name


@functools.cache
def _resolve_auto(op: str, problem: Problem) -> ResolvedBackend:
    speeds, unavailable = speeds_for(op, problem), _UNAVAILABLE.setdefault(op, {})
    choice = _resolve(_TABLES[op], problem, AUTO, speeds, unavailable)
    warn_of_unmeasured(_case_of(op, problem), newer_backends(_TABLES[op], problem, unavailable, speeds))
    logger.debug("%s: %s", op, choice.reason)
    return choice
