"""Build a compiled backend once for this machine, and keep it.

The library's name carries a hash of all that it depends on: sources, flags, compiler and instruction set. So a
change of any of them builds anew, a second process finds the first one's work, and a cache folder shared by
machines of several kinds holds one library for each.
"""

import ctypes
import errno
import functools
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rwkv_train.errors import BackendError
from rwkv_train.ops.build_lock import hold_lock, raise_if_cancelled

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
CACHE_VARIABLE = "RWKV_TRAIN_KERNELS"
"""Environment variable with the folder of built libraries: kernels are loaded where no setting of a run reaches."""
LIMIT_SECONDS = 1800.0
"""A compiler that takes longer hangs."""
_ANSWER_SECONDS = 30.0
"""How long a compiler may take to name its macros; over a slow network disk it takes some seconds."""
_REPORT_SECONDS = 10.0
_LOOK_SECONDS = 0.2
"""How often it is seen whether a build was cancelled."""
_INTERRUPTED = "build stopped: interrupted by user"
"""What ninja says last when Ctrl-C, which the terminal sends to it too, or another signal ends it."""
_FULL_DISK = ("No space left on device", "Disk quota exceeded")
_LITTLE_BYTES = 1_000_000
"""With less room than that, a compiler that fails lacked room, whatever it says (a linker just crashes)."""


class Recipe(NamedTuple):
    """How a library is made."""

    name: str
    """What it is called in messages."""
    compiler: Path
    rules: str
    """A build file of ninja that makes ``library.so``."""
    explain: Callable[[str], str | None] = lambda output: None
    """Says what to do about the compiler's output, if it is known."""


def default_cache_folder() -> Path:
    """Return the folder where built libraries are kept: ``$RWKV_TRAIN_KERNELS``, or one in the user's home.

    Raises:
        BackendError: the user has no home.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "rwkv-train" / "kernels"
    except RuntimeError as error:
        raise BackendError(
            f"there is no home folder to keep built kernels in ({error}); name a folder in {CACHE_VARIABLE}"
        ) from error


def build_library(
    name: str,
    source: Path,
    headers: Sequence[Path] = (),
    *,
    cache_folder: Path | None = None,
    compilers: Sequence[str] = COMPILERS,
    flags: Sequence[str] = FLAGS,
    anew: bool = False,
) -> Path:
    """Compile a C++ source into a shared library, unless that has been done before.

    Processes that ask at once build it once: one builds under a lock, the others wait. The library appears under
    its name only when it is whole.

    Args:
        name: what the library is called in messages and file names.
        source: the C++ file; it includes its headers by relative paths.
        headers: files whose change also builds anew.
        cache_folder: where libraries are kept; :func:`default_cache_folder` if ``None``.
        compilers: commands to look for, the first one found is taken.
        flags: the compiler's flags.
        anew: build even what is there.

    Raises:
        BackendError: there is no compiler or no ninja, the folder cannot be written, the disk is full, or the source
            does not compile.
    """
    compiler = _find_compiler(tuple(compilers))
    digest = fingerprint(" ".join(flags).encode(), _predefined_macros(compiler), sources=(source, *headers))
    library = (cache_folder or default_cache_folder()) / f"{name}-{digest}.so"
    rule = f"rule library\n  command = {quote(compiler)} {' '.join(flags)} $in -o $out\n"
    rules = f"{rule}build library.so: library {escape(source)}\n"
    build_once(library, Recipe(name, compiler, rules), anew=anew)
    return library


def build_once(
    library: Path, recipe: Recipe, *, anew: bool = False, cancel: threading.Event | None = None
) -> None:
    """Make a library unless it is there and whole, under a lock that outlives no builder.

    Args:
        library: the file; its folder is made where it is missing.
        recipe: how to make it.
        anew: make it even if it is there, because what is there cannot be loaded.
        cancel: ends the build within a second or so when it is set.

    Raises:
        BackendError: the folder cannot be written, the disk is full, or the sources do not compile.
        BuildCancelledError: ``cancel`` was set.
    """
    try:
        before = _identity(library)

        def is_done() -> bool:
            now = _identity(library)
            return now is not None and not (anew and now == before) and not is_cut_short(library)

        if is_done():
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        lock = library.with_suffix(".lock")
        with hold_lock(lock, f"the kernel '{recipe.name}'", is_done, cancel=cancel) as folder:
            if folder is not None:
                _build(recipe, library, folder, cancel)
    except OSError as error:
        raise BackendError(_disk_problem(recipe.name, library.parent, error)) from error


def load_library(library: Path) -> ctypes.CDLL:
    """Load a library that was built.

    Raises:
        OSError: it cannot be loaded; the text says why.
    """
    # Asked first: the loader maps what the header promises, and to touch what is not there is a bus error, which
    # ends the process.
    if is_cut_short(library):
        raise OSError(f"{library} is damaged: its end is missing")
    return ctypes.CDLL(str(library))


def is_cut_short(library: Path) -> bool:
    """Tell whether a library ends before its table of sections, which the linker writes last.

    That is known of 64-bit ELF, the format of Linux; any other file is taken for whole, and the loader refuses it.
    """
    try:
        with library.open("rb") as file:
            header = file.read(64)
            n_bytes = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if header[:5] != b"\x7fELF\x02":
        return False
    if len(header) < 64:
        return True
    order = "<" if header[5] == 1 else ">"
    (start,) = struct.unpack_from(f"{order}Q", header, 0x28)  # e_shoff
    entry_bytes, n_entries = struct.unpack_from(f"{order}HH", header, 0x3A)  # e_shentsize, e_shnum
    return bool(start + n_entries * entry_bytes > n_bytes)


def fingerprint(*parts: bytes, sources: Sequence[Path]) -> str:
    """Hash what a library depends on."""
    digest = hashlib.sha256()
    for part in (*parts, *(source.read_bytes() for source in sources)):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def find_ninja() -> Path:
    """Return the program ninja.

    Raises:
        BackendError: there is none.
    """
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


def quote(path: Path | str) -> str:
    """Write a word of a command as a build file of ninja wants it."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path) -> str:
    """Write a path as a build file of ninja wants it."""
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def first_error(output: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # Of nvcc's own lines, the last ones of a failure, many say "fatal" alone; ninja's own is the last of all.
    for word in ("error", "fatal"):
        if found := next((line for line in lines if word in line), None):
            return found
    return lines[-1] if lines else "it says nothing"


def temporary_folder_problem(environment: Mapping[str, str] | None = None) -> str | None:
    """Say why compilers cannot write where ``TMPDIR`` says, or ``None``.

    To be asked once one has failed: not all of them mind, and what they say of it names no cause.
    """
    folder = (os.environ if environment is None else environment).get("TMPDIR")
    if not folder or (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return None
    why = "cannot be written" if Path(folder).is_dir() else "is no folder"
    return f"TMPDIR={folder}, where compilers put what they need for a moment, {why}; name another one, or unset it"


def _build(recipe: Recipe, library: Path, folder: Path, cancel: threading.Event | None) -> None:
    # A warning only so that it is seen without any set-up of logging: the program is about to stand still.
    logger.warning(
        "building the kernel '%s' for this machine with %s (once, some seconds) -> %s",
        recipe.name,
        recipe.compiler,
        library,
    )
    (folder / "build.ninja").write_text(recipe.rules)
    returncode, output = _run_ninja(recipe.name, folder, cancel)
    raise_if_cancelled(cancel)
    if returncode != 0 and _INTERRUPTED in output:
        raise BackendError(f"building the kernel '{recipe.name}' was interrupted; start it again")
    unfinished = folder / "library.so"
    if returncode != 0 or not unfinished.is_file():
        raise BackendError(_compiler_problem(recipe, library, output))
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())  # else a power cut may leave the name without all of the content
    unfinished.replace(library)  # on one disk, so all at once


def _run_ninja(name: str, folder: Path, cancel: threading.Event | None) -> tuple[int, str]:
    """Return the exit code and all output; say every few seconds that it is still at work."""
    process = subprocess.Popen(
        [find_ninja(), "-C", folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # so that the word "error" is English
    )
    began = time.monotonic()
    next_report = _REPORT_SECONDS
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                raise_if_cancelled(cancel)
                seconds = time.monotonic() - began
                if seconds < next_report:
                    continue
                next_report += _REPORT_SECONDS
                logger.warning("still building the kernel '%s' (%.0f s)", name, seconds)
                if seconds > LIMIT_SECONDS:
                    raise BackendError(
                        f"building the kernel '{name}' took longer than {LIMIT_SECONDS:.0f} s; see whether the "
                        "machine is out of memory or its disk does not answer"
                    ) from None
            else:
                return process.returncode, output
    finally:
        if process.poll() is None:
            compilers = _children_of(process.pid)
            process.terminate()  # ninja ends its compilers, which a kill would leave behind
            try:
                process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                for compiler in compilers:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(compiler, signal.SIGKILL)  # ninja gives each a group of its own
                process.communicate()


def _children_of(pid: int) -> list[int]:
    """Return the processes that one has started; none where the system does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _compiler_problem(recipe: Recipe, library: Path, output: str) -> str:
    """Say in one sentence why nothing came out, and keep the whole output."""
    where = {str(library.parent): library.parent, tempfile.gettempdir(): Path(tempfile.gettempdir())}
    full = [name for name, folder in where.items() if shutil.disk_usage(folder).free < _LITTLE_BYTES]
    if full or any(message in output for message in _FULL_DISK):
        return (
            f"the kernel '{recipe.name}' cannot be built because the disk of {' or '.join(full or where)} is full; "
            f"free some space, or name other folders in {CACHE_VARIABLE} (for kernels) and TMPDIR (for the compiler)"
        )
    log = library.with_suffix(".log")
    try:
        log.write_text(output)
        kept = f"the whole output is in {log}"
    except OSError as error:
        kept = f"the whole output could not be kept ({error})"
    said = first_error(output)
    if known := temporary_folder_problem() or recipe.explain(output):
        # What to do comes last, and what the compiler said stays beside it: it may have another reason.
        return f"the kernel '{recipe.name}' cannot be built ({said}; {kept}): {known}"
    return f"the kernel '{recipe.name}' does not compile with {recipe.compiler}: {said}; {kept}"


def _disk_problem(name: str, folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the kernel '{name}' cannot be built because the disk of {folder} is full ({error.strerror}); free some "
            f"space, or name another folder in {CACHE_VARIABLE}"
        )
    return (
        f"the kernel '{name}' cannot be built because the folder {folder} cannot be written ({error}); "
        f"make it writable, or name another folder in {CACHE_VARIABLE}"
    )


def _identity(library: Path) -> tuple[int, int] | None:
    """Tell one file of a name from the next."""
    try:
        status = library.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


@functools.cache
def _find_compiler(compilers: tuple[str, ...]) -> Path:
    for command in compilers:
        if found := shutil.which(command):
            return Path(found)
    raise BackendError(
        f"no C++ compiler was found (looked for {', '.join(compilers)}); install g++, for example with "
        "'apt install g++'"
    )


@functools.cache
def _predefined_macros(compiler: Path) -> bytes:
    """Ask the compiler for its macros: they hold its version and the instruction sets of this machine."""
    command = [str(compiler), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    remedy = "install it anew, or put another one first on PATH"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(
            f"the compiler {compiler} did not answer within {_ANSWER_SECONDS:.0f} s; {remedy}"
        ) from error
    except OSError as error:
        raise BackendError(
            f"the compiler {compiler} cannot be started ({error.strerror or error}); {remedy}"
        ) from error
    if done.returncode != 0:
        said = first_error(done.stderr.decode(errors="replace"))
        if problem := temporary_folder_problem():
            raise BackendError(f"the compiler {compiler} fails ({said}): {problem}")
        raise BackendError(f"the compiler {compiler} does not work: {said}; {remedy}")
    return done.stdout
