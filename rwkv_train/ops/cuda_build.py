"""Build the CUDA backend of an operator, and find one that was built before.

A library is one file that needs nothing but the driver: the CUDA runtime is linked into it, so it does not matter
which CUDA torch was built with. Its name says what it holds::

    wkv7_cuda-HASH-x86_64-nvcc13.0.88-sm_80+sm_90+compute_80.so

where HASH is that of sources and flags. So what runs on a machine can be told without a compiler, and a folder of
kernels can be built elsewhere and brought there.
"""

import ctypes
import functools
import logging
import platform
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rwkv_train.assets import find_asset_folder
from rwkv_train.errors import BackendError
from rwkv_train.ops.build import (
    Recipe,
    build_once,
    default_cache_folder,
    escape,
    fingerprint,
    load_library,
    quote,
)
from rwkv_train.ops.cuda_driver import Chip, Driver, Version, ask_driver
from rwkv_train.ops.cuda_toolkit import (
    OLDEST_ARCHITECTURE,
    OLDEST_OF_CUDA_13,
    OLDEST_WITH_BFLOAT16,
    Toolkit,
    check_architectures,
    explain_nvcc,
    find_toolkit,
    host_compiler,
    is_new_enough,
    number_of,
    why_driver_refuses,
)

logger = logging.getLogger(__name__)

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80")
"""What a library for every machine holds: code for each family of chips, and what the driver of any later one can
compile when it is loaded."""

FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
LINK_FLAGS = ("--shared", "--cudart=static", "-Xlinker", "--as-needed,--exclude-libs=ALL")
PREBUILT = "prebuilt"
"""Folder within ``cuda/`` of libraries that a wheel brings along."""


class CudaSource(NamedTuple):
    """The files of an operator's CUDA backend."""

    op: str
    units: tuple[Path, ...]
    """Compiled each by itself."""
    headers: tuple[Path, ...]

    @property
    def hash(self) -> str:
        """Hash of all files and of the flags."""
        flags = " ".join((*FLAGS, *LINK_FLAGS)).encode()
        return fingerprint(flags, sources=(*self.units, *self.headers))


class Built(NamedTuple):
    """What the name of a library says."""

    op: str
    hash: str
    machine: str
    """Processor of the host, as in ``platform.machine()``."""
    nvcc: str
    """Version, ``"13.0.88"``."""
    architectures: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The name."""
        holds = "+".join(self.architectures)
        return f"{self.op}_cuda-{self.hash}-{self.machine}-nvcc{self.nvcc}-{holds}.so"

    @classmethod
    def parse(cls, file_name: str) -> "Built | None":
        """Return what a name says; ``None`` if it is none of ours."""
        found = re.fullmatch(r"(\w+)_cuda-([0-9a-f]+)-(\w+)-nvcc([\d.]+)-([a-z0-9_+]+)\.so", file_name)
        if found is None:
            return None
        op, digest, machine, nvcc, holds = found.groups()
        return cls(op, digest, machine, nvcc, tuple(holds.split("+")))

    def why_not(self, source: CudaSource, driver: Driver) -> str | None:
        """Say why it does not serve this machine, or ``None``."""
        if (self.op, self.hash, self.machine) != (source.op, source.hash, platform.machine()):
            return "it was built from other sources or for another processor"
        cuda = _cuda_of(self.nvcc)
        for chip in _usable(driver):
            if not runs_on(chip.architecture, self.architectures):
                return (
                    f"it holds {', '.join(self.architectures)}, nothing for {chip.architecture} ({chip.name})"
                )
            needs_ptx = not _has_code_for(chip.architecture, self.architectures)
            if driver.cuda and (refusal := why_driver_refuses(cuda, driver.cuda, needs_ptx=needs_ptx)):
                return refusal
        return None


def cuda_operators(folder: Path | None = None) -> tuple[str, ...]:
    """Return the names of the operators that have a CUDA backend, from the folder of sources."""
    folder = folder or find_asset_folder("cuda")
    return tuple(sorted(path.parent.name for path in folder.glob("*/*.cu") if path.stem == path.parent.name))


def find_source(op: str, folder: Path | None = None) -> CudaSource:
    """Return the files of an operator's CUDA backend.

    Raises:
        BackendError: it has none.
    """
    folder = folder or find_asset_folder("cuda")
    units = sorted((folder / op).glob("*.cu"))
    if not units:
        raise BackendError(f"the operator '{op}' has no CUDA backend (there is no {folder / op / op}.cu)")
    headers = [path for place in (folder / op, folder / "common") for path in sorted(place.glob("*.cuh"))]
    return CudaSource(op, tuple(units), tuple(headers))


def build_cuda_library(
    op: str,
    architectures: Sequence[str] | None = None,
    *,
    cache_folder: Path | None = None,
    source_folder: Path | None = None,
    toolkit: Toolkit | None = None,
    driver: Driver | None = None,
    anew: bool = False,
    cancel: threading.Event | None = None,
) -> Path:
    """Compile the CUDA backend of an operator, unless that has been done before.

    Args:
        op: name of the operator: ``"wkv7"``.
        architectures: what to compile for, as in ``ARCHITECTURES``; ``None`` for the chips of this machine.
        cache_folder: where libraries are kept; :func:`default_cache_folder` if ``None``.
        source_folder: ``cuda/``, or another folder with an operator's folder in it.
        toolkit: the compiler; the one that :func:`find_toolkit` finds if ``None``.
        driver: what the driver says, if ``architectures`` is ``None``; it is asked if ``None``.
        anew: build even what is there.
        cancel: ends the build, and waiting for another one's, when it is set.

    Returns:
        The library.

    Raises:
        BackendError: there is no compiler, it is too old or too new for a chip, too new for the driver that is to run
            what it builds, a chip is too old for the kernels, there is no chip to build for, the disk is full or
            cannot be written, or the sources do not compile.
        BuildCancelledError: ``cancel`` was set.
    """
    source = find_source(op, source_folder)
    toolkit = toolkit or find_toolkit()
    if architectures is None:
        driver = driver or ask_driver()
        architectures = _architectures_of(driver)
        _check_driver(toolkit, driver)
    check_architectures(toolkit, architectures)
    architectures = tuple(sorted(set(architectures), key=_chips_before_ptx))
    built = Built(op, source.hash, platform.machine(), toolkit.version, architectures)
    library = (cache_folder or default_cache_folder()) / built.file_name
    build_once(library, _recipe(source, toolkit, architectures), anew=anew, cancel=cancel)
    return library


def load_cuda_library(
    op: str,
    *,
    cache_folder: Path | None = None,
    source_folder: Path | None = None,
    driver: Driver | None = None,
) -> ctypes.CDLL:
    """Load the CUDA backend of an operator: one that came with the wheel, one built before, or a new one.

    Args:
        op: name of the operator: ``"wkv7"``.
        cache_folder: where libraries are kept; :func:`default_cache_folder` if ``None``.
        source_folder: ``cuda/``, or another folder with an operator's folder in it.
        driver: what the driver says; it is asked if ``None``.

    Raises:
        BackendError: there is no driver or no chip, or nothing that fits is there and nothing can be built.
    """
    driver = driver or ask_driver()
    source = find_source(op, source_folder)
    architectures = _architectures_of(driver)
    cache_folder = cache_folder or default_cache_folder()
    passed_over: dict[Path, str] = {}

    def load_first(libraries: Iterable[Path]) -> ctypes.CDLL | None:
        for library in libraries:
            built = Built.parse(library.name)
            why_not = built.why_not(source, driver) if built else "its name is none of ours"
            if why_not is None:
                try:
                    return load_library(library)
                except OSError as error:
                    why_not = f"it cannot be loaded ({error})"
                    logger.warning("the kernel %s is passed over: %s", library, why_not)
            passed_over[library] = why_not
        return None

    prebuilt = (source_folder or find_asset_folder("cuda")) / PREBUILT
    if loaded := load_first(_libraries(op, prebuilt)):
        return loaded
    try:
        toolkit = _toolkit_for(driver)
        if loaded := load_first(_libraries(op, cache_folder, toolkit.version)):
            return loaded
        build = functools.partial(
            build_cuda_library, op, architectures, cache_folder=cache_folder, source_folder=source_folder
        )
        library = build(toolkit=toolkit)
        if library in passed_over:  # it was there and damaged
            with suppress(OSError):  # what has no end was built anew just now, other damage is still there
                return load_library(library)
            library = build(toolkit=toolkit, anew=True)
        return _load_built(library)
    except BackendError as error:
        # What another compiler made serves as well: on a node that has none, it was built elsewhere.
        if loaded := load_first(path for path in _libraries(op, cache_folder) if path not in passed_over):
            return loaded
        raise BackendError(f"{error}{_in_parentheses(passed_over)}") from error


def runs_on(chip: str, architectures: Sequence[str]) -> bool:
    """Tell whether a library of these architectures has code for a chip, or what its driver can make code of.

    PTX for chips without tensor cores for bfloat16 does not serve one that has them: kernels would stop there.
    """
    oldest = OLDEST_WITH_BFLOAT16 if number_of(chip) >= OLDEST_WITH_BFLOAT16 else OLDEST_ARCHITECTURE
    ptx = (number_of(name) for name in architectures if name.startswith("compute_"))
    return _has_code_for(chip, architectures) or any(oldest <= number <= number_of(chip) for number in ptx)


def _has_code_for(chip: str, architectures: Sequence[str]) -> bool:
    """Code runs on chips of the same family that are not older: that of sm_80 on sm_86, but not on sm_90."""
    number = number_of(chip)
    codes = (number_of(name) for name in architectures if name.startswith("sm_"))
    return any(code // 10 == number // 10 and code <= number for code in codes)


def _architectures_of(driver: Driver) -> tuple[str, ...]:
    if driver.problem is not None:
        raise BackendError(
            f"{driver.problem}; to build for another machine, name its chips ('rwkv-train build-kernels --arch sm_90')"
        )
    chips = _usable(driver)
    if not chips:
        names = ", ".join(f"{chip.name} ({chip.architecture})" for chip in driver.chips)
        raise BackendError(
            f"{names}: too old, the kernels need sm_{OLDEST_ARCHITECTURE} (Volta) or later; such a chip runs the "
            "backend 'torch'"
        )
    return tuple(sorted({chip.architecture for chip in chips}, key=number_of))


def _usable(driver: Driver) -> list[Chip]:
    """Return the chips that the kernels are for. An old one beside them (for a screen, say) is left alone.

    So is Volta beside newer ones: else a toolkit of CUDA 13, which dropped it, would serve none of them.
    """
    chips = [chip for chip in driver.chips if is_new_enough(chip.architecture)]
    return [chip for chip in chips if number_of(chip.architecture) >= OLDEST_OF_CUDA_13] or chips


def _toolkit_for(driver: Driver) -> Toolkit:
    """Find a compiler whose work the driver runs."""
    toolkit = find_toolkit()
    _check_driver(toolkit, driver)
    return toolkit


def _check_driver(toolkit: Toolkit, driver: Driver) -> None:
    """Refuse a compiler whose work the driver does not run."""
    if driver.cuda and (refusal := why_driver_refuses(toolkit.cuda, driver.cuda, needs_ptx=False)):
        raise BackendError(
            f"what {toolkit} builds does not run here: {refusal}; update the driver, or install the toolkit of CUDA "
            f"{driver.cuda[0]} and set CUDA_HOME to its folder"
        )


def _load_built(library: Path) -> ctypes.CDLL:
    try:
        return load_library(library)
    except OSError as error:
        raise BackendError(
            f"the kernel {library} was built and cannot be loaded ({error}); see whether the C++ compiler of nvcc "
            "(NVCC_CCBIN) is that of this system"
        ) from error


def _libraries(op: str, folder: Path, nvcc: str = "*") -> list[Path]:
    """Return an operator's libraries in a folder, newest first."""
    try:
        found = [(path.stat().st_mtime, path) for path in folder.glob(f"{op}_cuda-*-nvcc{nvcc}-*.so")]
    except OSError:
        return []  # not there, not readable, or just removed
    return [path for _, path in sorted(found, reverse=True)]


def _recipe(source: CudaSource, toolkit: Toolkit, architectures: Sequence[str]) -> Recipe:
    compiler = f"{quote(toolkit.nvcc)} -ccbin {quote(host_compiler())}"
    codes = " ".join(_code_flag(name) for name in architectures)
    if len(architectures) > 1:
        codes += " --threads 0"  # as many of them at once as there are cores
    lines = [
        "rule object",
        f"  command = {compiler} {' '.join(FLAGS)} {codes} -c $in -o $out",
        "rule library",
        f"  command = {compiler} {' '.join(LINK_FLAGS)} {_library_folder(toolkit)} $in -o $out",
    ]
    objects = [f"{unit.stem}.o" for unit in source.units]
    lines += [
        f"build {target}: object {escape(unit)}" for target, unit in zip(objects, source.units, strict=True)
    ]
    lines += [f"build library.so: library {' '.join(objects)}", ""]
    return Recipe(f"{source.op}_cuda", toolkit.nvcc, "\n".join(lines), explain_nvcc)


def _code_flag(architecture: str) -> str:
    number = number_of(architecture)
    return f"-gencode arch=compute_{number},code={architecture}"


def _library_folder(toolkit: Toolkit) -> str:
    """Return the flag for a toolkit of Python packages: its libraries lie where its nvcc does not look."""
    home = toolkit.nvcc.parent.parent
    is_package = (home / "lib").is_dir() and not (home / "lib64").exists() and home.parent.name == "nvidia"
    return f"-L{quote(home / 'lib')}" if is_package else ""


def _chips_before_ptx(architecture: str) -> tuple[bool, int]:
    return architecture.startswith("compute_"), number_of(architecture)


def _cuda_of(nvcc: str) -> Version:
    major, minor = nvcc.split(".")[:2]
    return int(major), int(minor)


def _in_parentheses(passed_over: Mapping[Path, str]) -> str:
    if not passed_over:
        return ""
    return " (passed over: " + "; ".join(f"{path}: {why}" for path, why in passed_over.items()) + ")"
