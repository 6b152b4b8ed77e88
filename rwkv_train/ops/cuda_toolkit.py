"""The CUDA toolkit of this machine: where nvcc is, what it compiles for, and what to say where it does not."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv_train.errors import BackendError
from rwkv_train.ops.build import temporary_folder_problem
from rwkv_train.ops.cuda_driver import Version

USUAL_PLACE = Path("/usr/local/cuda")
OLDEST_ARCHITECTURE = 70
"""Volta. Older chips lack what the kernels take for granted."""
OLDEST_OF_CUDA_13 = 75
"""Turing. CUDA 13 dropped what is older, so Volta takes a toolkit of CUDA 11 or 12."""
OLDEST_WITH_BFLOAT16 = 80
"""Ampere, the first whose tensor cores multiply bfloat16. In code for older chips, kernels on tensor cores stop."""
OLDEST_CUDA: Version = (11, 8)
HOST_COMPILERS = ("g++", "clang++")

SINCE: Mapping[str, Version] = {
    "sm_100": (12, 8),
    "sm_101": (12, 8),
    "sm_103": (12, 9),
    "sm_110": (13, 0),
    "sm_120": (12, 8),
    "sm_121": (12, 9),
    "sm_88": (13, 0),
}
"""The first CUDA that compiles for an architecture, where that is later than ``OLDEST_CUDA``."""

DRIVER_OF = {11: 450, 12: 525, 13: 580}
"""The first driver that runs libraries of a major version of CUDA; a minor version does not matter to it."""


class Toolkit(NamedTuple):
    """An nvcc that answers."""

    nvcc: Path
    version: str
    """All of it: ``"13.0.88"``."""
    architectures: frozenset[str]
    """What it compiles for: ``"sm_90"`` and so on."""

    @property
    def cuda(self) -> Version:
        """Version of CUDA."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    def __str__(self) -> str:
        return f"nvcc {self.version} ({self.nvcc})"


def find_toolkit(environment: Mapping[str, str] | None = None) -> Toolkit:
    """Find nvcc: below ``CUDA_HOME`` or ``CUDA_PATH``, on ``PATH``, in /usr/local/cuda, among Python's packages.

    Args:
        environment: where those variables are looked up; that of this process if ``None``, as every build with CUDA
            reads it.

    Raises:
        BackendError: there is none, it does not work, or it is too old for the sources.
    """
    environment = os.environ if environment is None else environment
    looked: list[str] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            looked.append(f"{variable}={home}")
            if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
                return _ask_nvcc(found)
    looked += ["PATH", str(USUAL_PLACE), "the package nvidia-cuda-nvcc"]
    path = environment.get("PATH", "")
    for folder in (*([path] if path else []), str(USUAL_PLACE / "bin"), *_folders_of_packages()):
        if found := shutil.which("nvcc", path=folder):
            return _ask_nvcc(found)
    raise BackendError(
        f"nvcc, the CUDA compiler, was not found (looked in {', '.join(looked)}); install the CUDA toolkit and set "
        "CUDA_HOME to its folder (or install its Python packages, see cuda/README.md), or build on a machine that has "
        "it ('rwkv-train build-kernels --arch sm_90') and bring the folder of kernels here"
    )


def host_compiler(environment: Mapping[str, str] | None = None) -> str:
    """Return the C++ compiler that nvcc is to use: ``NVCC_CCBIN``, or the first one on ``PATH``.

    Raises:
        BackendError: there is none.
    """
    environment = os.environ if environment is None else environment
    path = environment.get("PATH", "")
    given = environment.get("NVCC_CCBIN")
    for name in [given] if given else HOST_COMPILERS:
        if found := shutil.which(name, path=path or os.devnull):
            return found
    if given:
        raise BackendError(
            f"NVCC_CCBIN={given}: there is no such compiler; correct it, or unset it to use g++"
        )
    raise BackendError(
        f"nvcc needs a C++ compiler and none was found (looked for {', '.join(HOST_COMPILERS)} on PATH); install "
        "g++, for example with 'apt install g++', or name one in NVCC_CCBIN"
    )


def check_architectures(toolkit: Toolkit, architectures: Sequence[str]) -> None:
    """Refuse what the kernels or this nvcc cannot be compiled for.

    Args:
        toolkit: the compiler.
        architectures: as nvcc writes them: ``"sm_90"`` for a chip, ``"compute_80"`` for code that the driver of any
            chip from there on compiles when it is loaded (PTX).

    Raises:
        BackendError: one is none, too old, or not known to this nvcc, with what to do.
    """
    known = sorted((name for name in toolkit.architectures if is_new_enough(name)), key=number_of)
    for name in architectures:
        if re.fullmatch(r"(sm|compute)_\d{2,3}", name) is None:
            raise BackendError(f"'{name}' is no architecture; one is written as in 'sm_90'")
        if not is_new_enough(name):
            raise BackendError(
                f"{name} is too old: the kernels need sm_{OLDEST_ARCHITECTURE} (Volta) or later; such a chip runs "
                "the backend 'torch'"
            )
        chip = name.replace("compute", "sm")
        if chip in toolkit.architectures:
            continue
        since = SINCE.get(chip, (0, 0))
        if toolkit.cuda < since:
            fix = f"it needs CUDA {_text(since)} or later; install that and set CUDA_HOME to its folder"
        elif toolkit.cuda >= (13, 0) and number_of(chip) < OLDEST_OF_CUDA_13:
            fix = "CUDA 13 dropped it (Volta); install the toolkit of CUDA 12 and set CUDA_HOME to its folder"
        elif known and number_of(chip) < number_of(known[0]):
            fix = "it has been given up there; install an older CUDA toolkit and set CUDA_HOME to its folder"
        else:
            fix = f"it knows {', '.join(known)}; install a CUDA toolkit that knows it and set CUDA_HOME to its folder"
        raise BackendError(f"{toolkit} does not compile for {name}: {fix}")


def why_driver_refuses(cuda: Version, driver: Version, *, needs_ptx: bool) -> str | None:
    """Say why a driver does not run what a CUDA compiled, or ``None``.

    Args:
        cuda: version of the toolkit that made the library.
        driver: the newest CUDA that the driver runs.
        needs_ptx: whether the driver would have to compile it for its chip first, which takes one as new as the
            toolkit.
    """
    if driver[0] < cuda[0]:
        number = DRIVER_OF.get(cuda[0])
        name = f"a driver of CUDA {cuda[0]}" + (f" ({number} or later)" if number else "")
        return f"CUDA {_text(cuda)} needs {name}, and the one here is of CUDA {_text(driver)}"
    if needs_ptx and driver < cuda:
        return (
            f"to compile it for this chip takes a driver of CUDA {_text(cuda)} or later, and the one here is of "
            f"CUDA {_text(driver)}"
        )
    return None


def explain_nvcc(output: str) -> str | None:
    """Say what to do about the commonest failures of nvcc; ``None`` for any other one."""
    if found := re.search(r"unsupported (GNU|clang) version!.*?later than (\d+)", output):
        compiler = "g++" if found[1] == "GNU" else "clang++"
        return (
            f"this nvcc takes {compiler} up to version {found[2]}; install {compiler}-{found[2]} and name it in "
            f"NVCC_CCBIN (NVCC_CCBIN={compiler}-{found[2]}), or install a newer CUDA toolkit"
        )
    # Only as nvcc says it: a source's or a folder's name may hold the words too.
    if re.search(r"^nvcc (fatal|error)\s*:.*host compiler", output, re.IGNORECASE | re.MULTILINE):
        return (
            "nvcc cannot work with the C++ compiler here; install g++, for example with 'apt install g++', or name "
            "another one in NVCC_CCBIN"
        )
    if "Unsupported .version" in output:
        return (
            "the parts of the CUDA toolkit are of different versions; install all of one version (of Python packages: "
            "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt and nvidia-cuda-runtime)"
        )
    if "cannot find -lcudart" in output or "cuda_runtime.h: No such file" in output:
        return "the CUDA toolkit lacks its runtime (cuda_runtime.h, libcudart_static.a); install it whole"
    return None


def number_of(architecture: str) -> int:
    """Return 90 for ``"sm_90"`` and for ``"compute_90"``."""
    return int(architecture.rpartition("_")[2])


def is_new_enough(architecture: str) -> bool:
    """Tell whether the kernels can be compiled for an architecture at all."""
    return number_of(architecture) >= OLDEST_ARCHITECTURE


@functools.cache
def _ask_nvcc(path: str) -> Toolkit:
    said = _run(path, "--version")
    version = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if version is None:
        raise BackendError(f"{path} does not say its version; set CUDA_HOME to the folder of a CUDA toolkit")
    toolkit = Toolkit(Path(path), version[1], frozenset())
    if toolkit.cuda < OLDEST_CUDA:
        raise BackendError(
            f"{toolkit} is too old: the kernels need CUDA {_text(OLDEST_CUDA)} or later; install that and set "
            "CUDA_HOME to its folder"
        )
    codes = re.findall(r"^sm_\d+$", _run(path, "--list-gpu-code"), flags=re.MULTILINE)
    return toolkit._replace(architectures=frozenset(codes))


def _run(path: str, option: str) -> str:
    try:
        done = subprocess.run(
            [path, option], capture_output=True, text=True, errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{path} does not work ({error}); install the CUDA toolkit anew") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        if problem := temporary_folder_problem():
            raise BackendError(f"{path} fails ({said}): {problem}")
        raise BackendError(f"{path} does not work ({said}); install the CUDA toolkit anew")
    return done.stdout


def _folders_of_packages() -> list[str]:
    """Return where nvcc lies if it was installed as a Python package."""
    found = importlib.util.find_spec("nvidia")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return [str(folder) for place in places for folder in sorted(Path(place).glob("*/bin"))]


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
