"""What the C++ backends of all operators share: finding the source, building it, calling it."""

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.assets import find_asset_folder
from rwkv_train.errors import BackendError
from rwkv_train.ops.backends import Problem
from rwkv_train.ops.build import build_library, load_library

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses_cpp(problem: Problem) -> str | None:
    """Say why a C++ backend cannot run a problem, or ``None``."""
    if problem.device_type != "cpu":
        return f"it needs CPU tensors, not {problem.device_type}"
    if problem.dtype not in DTYPES:
        return f"it computes in float32, not {problem.dtype}"
    return None


def load_cpp_library(op: str, cache_folder: Path | None = None) -> ctypes.CDLL:
    """Load the C++ backend of an operator, built on first use, and built anew if it is damaged.

    Raises:
        BackendError: it cannot be built on this machine, or what it builds cannot be loaded.
    """
    folder = find_asset_folder("cuda")
    source = folder / op / f"{op}_cpu.cpp"
    headers = sorted((folder / "common").glob("*.h"))
    build = functools.partial(build_library, f"{op}_cpu", source, headers, cache_folder=cache_folder)
    library = build()
    try:
        return load_library(library)
    except OSError as error:
        damage = f"the kernel {library} cannot be loaded ({error})"
    logger.warning("%s; it is built anew", damage)
    try:
        return load_library(build(anew=True))
    except BackendError as error:
        raise BackendError(f"{damage}, nor built anew: {error}") from error
    except OSError as error:
        raise BackendError(
            f"the kernel {library} was built and cannot be loaded ({error}); see whether the C++ compiler (g++ or "
            "clang++) is that of this system"
        ) from error


def argument_types(n_sizes: int, n_tensors: int) -> Sequence[type]:
    """Types of the arguments of a launcher: sizes, addresses of tensors, the number of threads."""
    return (ctypes.c_int,) * n_sizes + (ctypes.c_void_p,) * n_tensors + (ctypes.c_int,)


def as_float32(x: Tensor) -> Tensor:
    """Return ``x`` as the kernels read it: float32, without gaps; itself if it is so already."""
    return x.to(torch.float32).contiguous()
