"""The backends of each operator on each device: which can be had, which "auto" takes, and what to do about the rest."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rwkv_train.planning.doctor.finding import split_remedy

BackendStatus = Literal["available", "refuses", "unavailable", "fails", "wrong", "crashes"]
"""``"refuses"``: made for other problems; ``"unavailable"``: cannot be loaded; the rest: loaded, but of no use."""

_REMEDIES = {
    "no kernel image": "it has no code for this chip: install a torch (or build kernels) that names its architecture",
    "out of memory": "another program holds the chip's memory: nvidia-smi names it",
    "busy or unavailable": "another program holds the chip for itself: nvidia-smi names it",
    "driver": "see what is said of the driver",
}
"""Words of an error of CUDA -> what to do."""


class BackendRow(NamedTuple):
    """What came of one backend for one dtype."""

    device: str
    op: str
    backend: str
    dtype: str
    status: BackendStatus
    is_auto: bool
    """Whether training takes it where ``trainer.wkv_backend`` is "auto": where speeds were measured on this chip, at
    the sizes of the trials' ``TRAINED_TOKENS`` and ``TRAINED_HEADS``."""
    reason: str | None
    """Why it is not available."""
    remedy: str | None
    """What to do; ``None`` where nothing needs to be done."""


def judge_backends(
    results: Mapping[str, Mapping[str, Any]], preferences: Mapping[str, Sequence[str]]
) -> list[BackendRow]:
    """Return a row for each trial of a backend.

    Args:
        results: name of a trial, ``"DEVICE OP BACKEND DTYPE"`` -> what came of it.
        preferences: ``"DEVICE OP DTYPE"`` -> the backends that "auto" may take, the one that it takes first first.
    """
    outcomes = {name: _status(facts) for name, facts in results.items()}
    autos: dict[tuple[str, str, str], str] = {}
    for case, preferred in preferences.items():
        device, op, dtype = case.split()
        # A choice does not see what happens when it runs.
        loaded = (
            backend
            for backend in preferred
            if outcomes.get(f"{device} {op} {backend} {dtype}") not in (None, "refuses", "unavailable")
        )
        autos[device, op, dtype] = next(loaded, "")
    usable: dict[tuple[str, str, str], str] = {}
    for name, status in outcomes.items():
        device, op, backend, dtype = name.split()
        if status == "available":
            usable.setdefault((device, op, dtype), backend)
    rows = []
    for name, status in outcomes.items():
        device, op, backend, dtype = name.split()
        place = device, op, dtype
        reason, remedy = _explain(status, results[name], usable.get(place))
        is_auto = autos.get(place) == backend
        rows.append(BackendRow(device, op, backend, dtype, status, is_auto, reason, remedy))
    return rows


def ops_without_backend(rows: Sequence[BackendRow], device_type: str) -> list[str]:
    """Return the operators that no backend runs on the first device of a type."""
    there = [row for row in rows if row.device in (device_type, f"{device_type}:0")]
    have_one = {row.op for row in there if row.status == "available"}
    return [op for op in dict.fromkeys(row.op for row in there) if op not in have_one]


def _status(facts: Mapping[str, Any]) -> BackendStatus:
    status: BackendStatus = facts.get("status", "crashes")
    return status


def _explain(
    status: BackendStatus, facts: Mapping[str, Any], instead: str | None
) -> tuple[str | None, str | None]:
    """Return why a backend is not available, and what to do."""
    if status == "available":
        return None, None
    if status == "refuses":
        return facts["reason"], None
    if status == "unavailable":
        reason, remedy = split_remedy(facts["reason"])
        if remedy is None or remedy.startswith("the whole output"):
            return facts["reason"], "see what is said of the compilers, or report it with that output"
        return reason, remedy
    reason = facts.get("reason") or facts["problem"]
    if status == "fails":
        reason = f"it fails when it runs ({reason})"
    for words, remedy in _REMEDIES.items():
        if words in reason:
            return reason, remedy
    meanwhile = f"set trainer.wkv_backend to '{instead}' meanwhile, and " if instead else ""
    return reason, f"{meanwhile}report it with the output of this command"
