"""What compiles kernels: the C++ compiler, ninja and nvcc."""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.errors import BackendError
from rwkv_train.ops.cuda_driver import Driver
from rwkv_train.ops.cuda_toolkit import Toolkit, number_of, why_driver_refuses
from rwkv_train.planning.doctor.finding import Finding, split_remedy

PATIENCE_SECONDS = 30.0
"""How long a compiler may take to say its version; over a slow network disk it takes some seconds."""

_NOTHING: Mapping[str, Any] = {"path": None, "version": None}


def find_compiler(compilers: Sequence[str], search_path: str | None = None) -> Finding:
    """Return the C++ compiler that builds kernels: the first of ``compilers`` that is there.

    Args:
        compilers: commands to look for.
        search_path: folders as in ``PATH``; ``None`` for this process' own.
    """
    paths = (shutil.which(name, path=search_path) for name in compilers)
    found = next((path for path in paths if path), None)
    if found is None:
        return Finding(
            "compiler",
            "warning",
            f"no C++ compiler ({' or '.join(compilers)}), so no kernel can be built",
            "install g++ (Debian: apt install g++; conda: conda install gxx)",
            _NOTHING,
        )
    output, problem = _ask(found)
    version = output.partition("\n")[0]
    facts = {"path": found, "version": version or None}
    if problem is not None:
        return Finding(
            "compiler",
            "warning",
            f"{found} {problem}",
            "install it anew, or put another one first on PATH",
            facts,
        )
    return Finding("compiler", "ok", f"{version} at {found}", facts=facts)


def find_ninja_program(find: Callable[[], Path]) -> Finding:
    """Return the ninja that runs the builds.

    Args:
        find: returns its path or raises ``BackendError``.
    """
    try:
        path = str(find())
    except BackendError as error:
        found, remedy = split_remedy(str(error))
        return Finding("ninja", "warning", found, remedy or "pip install ninja", _NOTHING)
    output, problem = _ask(path)
    facts = {"path": path, "version": output or None}
    if problem is not None:
        return Finding("ninja", "warning", f"{path} {problem}", "pip install --force-reinstall ninja", facts)
    return Finding("ninja", "ok", f"{output} at {path}", facts=facts)


def find_cuda_compiler(
    find: Callable[[], Toolkit], find_host: Callable[[], str], driver: Driver, *, has_chips: bool
) -> Finding:
    """Return the nvcc that builds CUDA kernels, whether it has a C++ compiler, and the driver runs what it makes.

    Args:
        find: returns it or raises ``BackendError``.
        find_host: returns the path of the C++ compiler that it is to use, or raises ``BackendError``.
        driver: NVIDIA's driver.
        has_chips: whether this machine has NVIDIA chips; without one, nothing is built.
    """
    try:
        toolkit = find()
    except BackendError as error:
        found, remedy = split_remedy(str(error))
        remedy = remedy or "install NVIDIA's CUDA toolkit and set CUDA_HOME to its folder"
        return Finding(
            "nvcc", "warning" if has_chips else "absent", found, remedy, {**_NOTHING, "architectures": []}
        )
    architectures = sorted(toolkit.architectures, key=number_of)
    facts = {"path": str(toolkit.nvcc), "version": toolkit.version, "architectures": architectures}
    found = f"CUDA {toolkit.version} at {toolkit.nvcc}"
    refusal = driver.cuda and why_driver_refuses(toolkit.cuda, driver.cuda, needs_ptx=False)
    if driver.cuda and refusal:
        remedy = f"update the driver, or install the toolkit of CUDA {driver.cuda[0]} and set CUDA_HOME to its folder"
        return Finding("nvcc", "warning", f"{found}, but {refusal}", remedy, facts)
    try:
        host = find_host()
    except BackendError as error:
        problem, remedy = split_remedy(str(error))
        return Finding("nvcc", "warning", f"{found}, but {problem}", remedy, facts)
    _, trouble = _ask(host)
    if trouble is not None:
        remedy = "install it anew, or name another one in NVCC_CCBIN"
        return Finding("nvcc", "warning", f"{found}, but its C++ compiler {host} {trouble}", remedy, facts)
    return Finding("nvcc", "ok", found, facts=facts)


def _ask(program: str) -> tuple[str, str | None]:
    """Return what a program says of its version, and what is wrong with it."""
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "", f"did not answer within {PATIENCE_SECONDS:.0f} seconds"
    except OSError as error:
        return "", f"cannot be started ({error.strerror or error})"
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return "", f"does not work ({lines[0].strip() if lines else f'exit code {done.returncode}'})"
    return done.stdout.strip(), None
