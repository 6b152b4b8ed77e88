"""Compile every CUDA source for every architecture, warnings as errors, and show what each kernel takes.

``make cuda-check`` runs it on all sources; by hand, on some (from the folder of the checkout)::

    .venv/bin/python cuda/check.py wkv7 --arch sm_90

It needs nvcc and no GPU. It fails where a source does not compile, a library lacks a function that Python calls, or a
kernel spills registers into memory on a chip that runs it.
"""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rwkv_train.errors import BackendError
from rwkv_train.ops.cuda_build import ARCHITECTURES, FLAGS, LINK_FLAGS, cuda_operators, find_source
from rwkv_train.ops.cuda_toolkit import (
    OLDEST_WITH_BFLOAT16,
    Toolkit,
    check_architectures,
    find_toolkit,
    host_compiler,
    number_of,
)

STRICT = ("-Xptxas", "-v", "-Werror", "all-warnings")
STRICT_HOST = ("-Xcompiler", "-Wall,-Wextra,-Wno-unused-parameter")
WHOLE = "sm_90"
"""Compiled with its host code and linked; for the others the device code alone, which is most of the time."""
FUNCTIONS = ("checkpoint_tokens", "step", "error")
FUNCTIONS_OF_FORM = ("workspace_bytes", "forward", "backward")
CHUNKED = "_chunked"
"""Part of the name of a source of kernels on tensor cores, and of the names of what it exports."""
CHUNKED_FORMS = (CHUNKED, f"{CHUNKED}_whole", f"{CHUNKED}_segments")
FORMS = {
    "wkv4": ("", "_sequential", "_scan"),
    "wkv5": ("", *CHUNKED_FORMS),
    "wkv6": ("", *CHUNKED_FORMS),
    "wkv7": ("", *CHUNKED_FORMS, f"{CHUNKED}_bf16"),
}
"""Endings of the names of ``FUNCTIONS_OF_FORM`` in the library of an operator."""
SPILLS_ALLOWED: dict[str, str] = {}
"""Kernels that may spill, as ``"wkv7_chunked_backward/backward_kernel<64>"`` after the source, each with the reason."""


class Kernel(NamedTuple):
    """What one kernel takes on one architecture, as the assembler says it."""

    name: str
    registers: int
    shared_bytes: int
    """Of fixed size; what a launch adds is not seen here."""
    spilled_bytes: int
    """Written to memory and read back, per thread."""


class Result(NamedTuple):
    """One source compiled for one architecture."""

    source: Path
    architecture: str
    seconds: float
    problem: str | None
    kernels: tuple[Kernel, ...]


def compile_source(source: Path, architecture: str, toolkit: Toolkit, folder: Path) -> Result:
    """Compile a source as strictly as nvcc and the C++ compiler can be asked to."""
    command = [str(toolkit.nvcc), "-ccbin", host_compiler(), *FLAGS, *STRICT]
    target = folder / f"{source.stem}-{architecture}"
    if architecture == WHOLE:
        command += [*STRICT_HOST, f"-arch={architecture}", "-c"]
    else:
        # PTX alone takes no host code either, but its own number for an architecture.
        command += [f"-arch={architecture}", "-ptx" if architecture.startswith("compute_") else "-cubin"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    output = done.stdout + done.stderr
    problem = output if done.returncode else None
    return Result(source, architecture, seconds, problem, tuple(read_kernels(output)))


def read_kernels(output: str) -> Iterator[Kernel]:
    """Read what ``ptxas -v`` says, kernel by kernel, in order of name."""
    found = []
    for part in re.split(r"Compiling entry function ", output)[1:]:
        name = re.match(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        if name and registers:
            found.append((name[1], int(registers[1]), int(shared[1]) if shared else 0, spilled))
    names = readable_names([name for name, *_ in found])
    yield from sorted(Kernel(name, *numbers) for name, (_, *numbers) in zip(names, found, strict=True))


def readable_names(names: Sequence[str]) -> list[str]:
    """Turn the compiler's names into ``kernel<64>``; left alone where binutils is missing."""
    if not names or shutil.which("c++filt") is None:
        return list(names)
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short_name(line) for line in said.stdout.splitlines()]


def short_name(name: str) -> str:
    """Drop types, namespaces and arguments: ``void (anonymous namespace)::f<(int)64, (bool)1>(int)`` is f<64, 1>."""
    name = re.sub(r"\(anonymous namespace\)::|\([\w: ]+\)(?=[-\w])", "", name.removeprefix("void "))
    return re.sub(r"^(\w+::)*", "", name.partition("(")[0])


def check_library(op: str, toolkit: Toolkit, folder: Path) -> list[str]:
    """Link what was compiled for ``WHOLE``, load it, and say what is missing."""
    library = folder / f"{op}.so"
    objects = [str(folder / f"{unit.stem}-{WHOLE}") for unit in find_source(op).units]
    renamed = [Path(name).rename(f"{name}.o") for name in objects]
    command = [
        str(toolkit.nvcc),
        "-ccbin",
        host_compiler(),
        *LINK_FLAGS,
        *map(str, renamed),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"{op}: does not link: {done.stdout}{done.stderr}"]
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return [f"{op}: cannot be loaded: {error}"]
    return [f"{op}: exports no function {name}" for name in functions_of(op) if not hasattr(loaded, name)]


def functions_of(op: str) -> list[str]:
    """Return the names of the functions that Python calls."""
    forms = FORMS[op]
    names = [*FUNCTIONS, *(f"{name}{form}" for form in forms for name in FUNCTIONS_OF_FORM)]
    if CHUNKED in forms:
        names.append(f"checkpoint_tokens{CHUNKED}")
    return [f"rwkv_{op}_{name}" for name in names]


def print_table(results: Sequence[Result]) -> None:
    """Print a row for each kernel, a column for each architecture."""
    architectures = list(dict.fromkeys(result.architecture for result in results))
    print("\nEach cell: registers of a thread / bytes of fixed shared memory / bytes spilled")
    for source in dict.fromkeys(result.source for result in results):
        of_source = {result.architecture: result for result in results if result.source == source}
        rows = [[source.stem, *architectures]]
        names = dict.fromkeys(kernel.name for result in of_source.values() for kernel in result.kernels)
        for name in names:
            cells = [
                next((_cell(kernel) for kernel in of_source[a].kernels if kernel.name == name), "")
                for a in architectures
            ]
            rows.append([name, *cells])
        rows.append(["seconds", *(f"{of_source[a].seconds:.1f}" for a in architectures)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(architectures) + 1)]
        print()
        for row in rows:
            first, *cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(f"{first}  {'  '.join(cells)}".rstrip())


def problems_of(results: Sequence[Result]) -> list[str]:
    """Say what a source may not do and does."""
    found = []
    for result in results:
        where = f"{result.source.parent.name}/{result.source.name} for {result.architecture}"
        if result.problem is not None:
            found.append(f"{where} does not compile:\n{result.problem}")
        found += [
            f"{where}: {kernel.name} spills {kernel.spilled_bytes} bytes of {kernel.registers} registers"
            for kernel in result.kernels
            if kernel.spilled_bytes
            and runs_on(result.source, result.architecture)
            and f"{result.source.stem}/{kernel.name}" not in SPILLS_ALLOWED
        ]
    return found


def runs_on(source: Path, architecture: str) -> bool:
    """Tell whether Python runs the kernels of a source on chips of an architecture; they are compiled in any case."""
    return CHUNKED not in source.stem or number_of(architecture) >= OLDEST_WITH_BFLOAT16


def _cell(kernel: Kernel) -> str:
    return f"{kernel.registers}/{kernel.shared_bytes}/{kernel.spilled_bytes}"


def main() -> int:
    """Check what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="operators; all by default")
    parser.add_argument("--arch", action="append", metavar="NAME", help="architectures; all by default")
    arguments = parser.parse_args()
    ops = arguments.ops or cuda_operators()
    architectures = arguments.arch or ARCHITECTURES
    try:
        toolkit = find_toolkit()
        check_architectures(toolkit, architectures)
        units = [unit for op in ops for unit in find_source(op).units]
        host_compiler()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{toolkit}, {host_compiler()}, {len(units)} sources, {len(architectures)} architectures")
    began = time.perf_counter()
    jobs = [(unit, architecture) for architecture in architectures for unit in units]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        folder = Path(name)
        results = []
        for result in pool.map(lambda job: compile_source(*job, toolkit, folder), jobs):
            print(f"{result.source.name} {result.architecture} {result.seconds:.1f} s", file=sys.stderr)
            results.append(result)
        problems = problems_of(results)
        if WHOLE in architectures and not any(result.problem for result in results):
            problems += [problem for op in ops for problem in check_library(op, toolkit, folder)]
    print_table(results)
    print(f"\n{len(jobs)} compiled in {time.perf_counter() - began:.0f} s; {len(problems)} problems")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
