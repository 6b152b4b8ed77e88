"""Build a compiled backend once for this machine, and keep it.

The library's name carries a hash of all that it depends on: sources, flags, compiler and instruction set. So a
change of any of them builds anew, a second process finds the first one's work, and a cache folder shared by
machines of several kinds holds one library for each.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import filelock

from rwkv_train.errors import BackendError

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
)


def default_cache_folder() -> Path:
    """Return the folder where built libraries are kept."""
    return Path.home() / ".cache" / "rwkv-train" / "kernels"


def build_library(
    name: str,
    source: Path,
    headers: Sequence[Path] = (),
    *,
    cache_folder: Path | None = None,
    compilers: Sequence[str] = COMPILERS,
    flags: Sequence[str] = FLAGS,
) -> Path:
    """Compile a C++ source into a shared library, unless that has been done before.

    Processes that ask at once build it once: one builds under a file lock, the others wait. The library appears
    under its name only when it is whole.

    Args:
        name: what the library is called in messages and file names.
        source: the C++ file; it includes its headers by relative paths.
        headers: files whose change also builds anew.
        cache_folder: where libraries are kept; :func:`default_cache_folder` if ``None``.
        compilers: commands to look for, the first one found is taken.
        flags: the compiler's flags.

    Raises:
        BackendError: there is no compiler or no ninja, the folder cannot be written, or the source does not compile.
    """
    compiler = _find_compiler(tuple(compilers))
    cache_folder = cache_folder or default_cache_folder()
    library = cache_folder / f"{name}-{_fingerprint(compiler, source, headers, flags)}.so"
    if library.is_file():
        return library
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(library.with_suffix(".lock")):
            if not library.is_file():  # another process may have built it while this one waited
                _build(name, compiler, source, flags, library)
    except OSError as error:
        raise BackendError(
            f"the kernel '{name}' cannot be built because the folder {cache_folder} cannot be written ({error}); "
            "make it writable"
        ) from error
    return library


def _build(name: str, compiler: Path, source: Path, flags: Sequence[str], library: Path) -> None:
    ninja = _find_ninja()
    # A warning only so that it is seen without any set-up of logging: the program is about to stand still.
    logger.warning(
        "building the kernel '%s' for this machine with %s (once, some seconds) -> %s",
        name,
        compiler,
        library,
    )
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=library.parent) as folder:
        unfinished = Path(folder) / "library.so"
        rule = f"{shlex.quote(str(compiler)).replace('$', '$$')} {' '.join(flags)} $in -o $out"
        (Path(folder) / "build.ninja").write_text(
            f"rule library\n  command = {rule}\nbuild {unfinished.name}: library {_escape(source)}\n"
        )
        done = subprocess.run(
            [ninja, "-C", folder],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},  # so that the word "error" below is English
        )
        if done.returncode != 0:
            log = library.with_suffix(".log")
            log.write_text(done.stdout + done.stderr)
            raise BackendError(
                f"the kernel '{name}' does not compile with {compiler}: {_first_error(done.stdout)}; "
                f"the whole output is in {log}"
            )
        unfinished.replace(library)  # on one disk, so all at once


@functools.cache
def _find_compiler(compilers: tuple[str, ...]) -> Path:
    for command in compilers:
        if found := shutil.which(command):
            return Path(found)
    raise BackendError(
        f"no C++ compiler was found (looked for {', '.join(compilers)}); install g++, for example with "
        "'apt install g++'"
    )


def _find_ninja() -> Path:
    # The PyPI package puts the program beside the interpreter; that folder need not be on PATH.
    folders = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    package = importlib.util.find_spec("ninja")
    if package is not None and package.origin is not None:
        folders.append(Path(package.origin).parent / "data" / "bin")
    for folder in folders:
        if found := shutil.which("ninja", path=str(folder)):
            return Path(found)
    if found := shutil.which("ninja"):
        return Path(found)
    raise BackendError("the program ninja was not found; install it with 'pip install ninja'")


def _fingerprint(compiler: Path, source: Path, headers: Sequence[Path], flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (" ".join(flags).encode(), _predefined_macros(compiler), source.read_bytes()):
        digest.update(hashlib.sha256(part).digest())
    for header in headers:
        digest.update(hashlib.sha256(header.read_bytes()).digest())
    return digest.hexdigest()[:16]


@functools.cache
def _predefined_macros(compiler: Path) -> bytes:
    """Ask the compiler for its macros: they hold its version and the instruction sets of this machine."""
    command = [str(compiler), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise BackendError(
            f"the compiler {compiler} does not work: {_first_error(done.stderr.decode(errors='replace'))}"
        )
    return done.stdout


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")


def _escape(path: Path) -> str:
    """Write a path as a build file of ninja wants it."""
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
