"""The machine without its chips: Python, operating system, processor, memory, room for kernels."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.errors import BackendError
from rwkv_train.ops.build import CACHE_VARIABLE
from rwkv_train.planning.doctor.finding import Finding, gib, split_remedy

ENOUGH_MEMORY_BYTES = 2 * 2**30
"""Importing torch and Lightning and compiling a kernel take about one GiB."""
ENOUGH_DISK_BYTES = 500 * 2**20
"""A library takes a few MB, a build of all of them some tens more while it runs."""

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def examine_machine(cache_folder: Callable[[], Path], package: Path, version: str) -> list[Finding]:
    """Look at the machine that this process runs on.

    Args:
        cache_folder: returns where built kernels are kept, or raises ``BackendError``.
        package: the folder that ``rwkv_train`` was imported from.
        version: its version.
    """
    return [
        Finding(
            "rwkv_train", "ok", f"{version} in {package}", facts={"version": version, "folder": str(package)}
        ),
        find_python(sys.version_info[:3], sys.executable),
        Finding("system", "ok", platform.platform(), facts={"platform": platform.platform()}),
        find_processor(_PROC / "cpuinfo", _CGROUP / "cpu.max", usable_cores()),
        find_memory(_PROC / "meminfo", _CGROUP / "memory.max"),
        find_cache_folder(cache_folder),
    ]


def find_python(version: Sequence[int], executable: str) -> Finding:
    """Return which Python runs."""
    text = ".".join(map(str, version))
    return Finding(
        "python", "ok", f"{text} at {executable}", facts={"version": text, "executable": executable}
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_processor(cpu_info: Path, cpu_max: Path, n_cores: int) -> Finding:
    """Return the processor and the cores this process may use.

    Args:
        cpu_info: Linux's ``/proc/cpuinfo``; need not be there.
        cpu_max: a container's share, ``"MICROSECONDS PERIOD"`` or ``"max PERIOD"``; need not be there.
        n_cores: cores that the operating system lets this process run on.
    """
    name = platform.processor() or platform.machine()
    for line in _lines(cpu_info):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    found = f"{name}, {n_cores} {'core' if n_cores == 1 else 'cores'} for this process"
    share = next(iter(_lines(cpu_max)), "max").split()
    n_shared = None
    if len(share) == 2 and share[0].isdigit() and share[1].isdigit():
        n_shared = int(share[0]) / int(share[1])
        if n_shared < n_cores:
            found += f", held to the time of {n_shared:.3g} by its container"
    return Finding("cpu", "ok", found, facts={"name": name, "cores": n_cores, "container_cores": n_shared})


def find_memory(mem_info: Path, memory_max: Path) -> Finding:
    """Return the main memory.

    Args:
        mem_info: Linux's ``/proc/meminfo``; need not be there.
        memory_max: a container's limit in bytes, or ``"max"``; need not be there.
    """
    sizes = {}
    for line in _lines(mem_info):
        key, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            sizes[key] = int(number[0]) * 1024
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    limit_text = next(iter(_lines(memory_max)), "max").strip()
    limit = int(limit_text) if limit_text.isdigit() else None
    facts = {"total_bytes": total, "available_bytes": available, "container_limit_bytes": limit}
    if total is None or available is None:
        return Finding("memory", "ok", "not known on this system", facts=facts)
    found = f"{gib(total)}, {gib(available)} of it available"
    if limit is not None and limit < total:
        found += f", held to {gib(limit)} by its container"
        available = min(available, limit)
    if available < ENOUGH_MEMORY_BYTES:
        remedy = (
            "end other programs, or give the container more: kernels may not build and training may be killed"
        )
        return Finding("memory", "warning", found, remedy, facts)
    return Finding("memory", "ok", found, facts=facts)


def find_cache_folder(where: Callable[[], Path]) -> Finding:
    """Return whether built kernels can be kept in a folder; it is made if needed, as the first build would.

    Args:
        where: returns the folder, or raises ``BackendError``.
    """
    facts: dict[str, Any] = {"folder": None, "free_bytes": None, "is_writable": False}
    try:
        folder = where()
    except BackendError as error:
        found, remedy = split_remedy(str(error))
        return Finding("kernel_cache", "warning", found, remedy, facts)
    facts["folder"] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts["free_bytes"] = free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        return Finding(
            "kernel_cache",
            "warning",
            f"{folder} cannot be written ({error.strerror or error}), so no kernel can be built",
            f"make the folder writable, or name another one in {CACHE_VARIABLE}",
            facts,
        )
    facts["is_writable"] = True
    found = f"{folder}, {gib(free)} free"
    if free < ENOUGH_DISK_BYTES:
        return Finding(
            "kernel_cache",
            "warning",
            found,
            f"free some space there, or name another folder in {CACHE_VARIABLE}",
            facts,
        )
    return Finding("kernel_cache", "ok", found, facts=facts)


def _lines(path: Path) -> list[str]:
    """Return the lines of a small file of the system; none where it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
