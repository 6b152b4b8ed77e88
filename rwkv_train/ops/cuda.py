"""What the CUDA backends of all operators share: what they refuse, and how a function of theirs is called."""

import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from rwkv_train.errors import BackendError
from rwkv_train.ops.backends import Problem
from rwkv_train.ops.cuda_build import load_cuda_library
from rwkv_train.ops.cuda_toolkit import OLDEST_ARCHITECTURE, OLDEST_WITH_BFLOAT16

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the sources number the dtypes; the same in ``cuda/common/gpu.cuh``."""
LARGEST_HEAD = 128
HEAD_STEP = 8
CHUNKED_HEADS = (64, 128)
"""Head sizes of the kernels on tensor cores, each with code of its own."""

_NEEDS_OTHER_BUILD = {
    35: "the driver is too old for the CUDA that built it; update the driver, or build with an older nvcc",
    209: "it was built for other GPUs; run 'rwkv-train build-kernels' (with an --arch for each GPU, where a Volta, "
    "sm_70, is beside newer ones)",
    218: "its PTX does not fit this GPU; run 'rwkv-train build-kernels'",
    222: "the driver is too old for its PTX; update the driver, or run 'rwkv-train build-kernels'",
}
"""Error codes of CUDA that the user can repair, each with the remedy."""

_OF_AN_EARLIER_KERNEL = frozenset({700, *range(710, 720)})
"""Error codes of a kernel that has failed, which every later call returns too."""


class Platform(NamedTuple):
    """Where the kernels of ``cuda/OP/`` run. There is one, :data:`CUDA`; the tests have another, on the CPU."""

    dispatch_key: str
    load_library: Callable[[str], ctypes.CDLL]
    """Name of an operator -> its library, built where needed."""
    on_device: Callable[[torch.device], AbstractContextManager[object]]
    """Make a device the current one."""
    current_stream: Callable[[torch.device], int | None]
    """The stream that all work of a device goes to now."""


def refuses_cuda_exact(problem: Problem) -> str | None:
    """Say why an exact CUDA backend cannot run a problem, or ``None``."""
    if problem.device_type != "cuda":
        return f"it needs CUDA tensors, not {problem.device_type}"
    if problem.dtype not in DTYPE_CODES:
        return f"it computes in float32, not {problem.dtype}"
    N = problem.head_size
    if N is not None and (N % HEAD_STEP != 0 or not 0 < N <= LARGEST_HEAD):
        return f"it needs head sizes of {HEAD_STEP} to {LARGEST_HEAD} in steps of {HEAD_STEP}, not {N}"
    if problem.capability is not None and problem.capability < OLDEST_ARCHITECTURE:
        return f"it needs a GPU of sm_{OLDEST_ARCHITECTURE} or later, not sm_{problem.capability}"
    return None


def refuses_cuda(problem: Problem) -> str | None:
    """Say why a CUDA backend on tensor cores cannot run a problem, or ``None``."""
    if problem.device_type != "cuda":
        return f"it needs CUDA tensors, not {problem.device_type}"
    if problem.dtype != torch.bfloat16:
        return f"it computes with values in torch.bfloat16, not {problem.dtype}"
    if problem.head_size not in CHUNKED_HEADS:
        return f"it needs head sizes of {' or '.join(map(str, CHUNKED_HEADS))}, not {problem.head_size}"
    if problem.capability is not None and problem.capability < OLDEST_WITH_BFLOAT16:
        return f"it needs a GPU of sm_{OLDEST_WITH_BFLOAT16} or later, not sm_{problem.capability}"
    return None


def raise_on_error(library: ctypes.CDLL, op: str, name: str, code: int) -> None:
    """Do nothing for code 0, the success of a function ``rwkv_OP_NAME``.

    Raises:
        BackendError: the library does not fit this machine, which can be repaired.
        RuntimeError: any other error of CUDA.
    """
    if code == 0:
        return
    said = getattr(library, f"rwkv_{op}_error")(code).decode(errors="replace")
    if code in _OF_AN_EARLIER_KERNEL:
        said += ", by this or by an earlier operation on the GPU"
    if code in _NEEDS_OTHER_BUILD:
        raise BackendError(f"the CUDA kernel of {op} does not run here ({said}): {_NEEDS_OTHER_BUILD[code]}")
    raise RuntimeError(f"the CUDA kernel rwkv_{op}_{name} failed: {said} (CUDA error {code})")


CUDA = Platform(
    dispatch_key="CUDA",
    load_library=functools.cache(load_cuda_library),  # several backends of an operator are in it
    on_device=torch.cuda.device,
    current_stream=lambda device: torch.cuda.current_stream(device).cuda_stream,
)
