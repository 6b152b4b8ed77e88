"""The exact CUDA kernels of all operators, in all of their forms, on the platform where a test wants them."""

import ctypes
from typing import NamedTuple

from rwkv_train.ops.backends import Backend
from rwkv_train.ops.compiled import Signature
from rwkv_train.ops.cuda import Platform
from rwkv_train.ops.cuda_recurrence import cuda_recurrence
from rwkv_train.ops.prepare import OPERATORS
from rwkv_train.ops.wkv4 import cuda as wkv4_cuda
from rwkv_train.ops.wkv5 import cuda as wkv5_cuda
from rwkv_train.ops.wkv6 import cuda as wkv6_cuda
from rwkv_train.ops.wkv7 import cuda as wkv7_cuda

SIGNATURES = {
    "wkv4": wkv4_cuda.SIGNATURE,
    "wkv5": wkv5_cuda.SIGNATURE,
    "wkv6": wkv6_cuda.SIGNATURE,
    "wkv7": wkv7_cuda.SIGNATURE,
}
FORMS = [("wkv4", ""), ("wkv4", "_sequential"), ("wkv4", "_scan"), ("wkv5", ""), ("wkv6", ""), ("wkv7", "")]
"""Operators, each with a form of its kernels; without a name the source chooses."""


class CudaKernel(NamedTuple):
    """One form of an operator's kernels."""

    backend: str
    signature: Signature
    row: Backend
    """For the operator's table."""

    def load(self) -> ctypes.CDLL:
        return self.row.load()


def exact_kernels(platform: Platform, name: str) -> dict[tuple[str, str], CudaKernel]:
    """Register all forms for a platform, which may be done once; by operator and form.

    Args:
        name: of the backend without a form; ``"cuda_exact"`` is that of the tables.
    """
    return {
        (op, form): cuda_kernel(SIGNATURES[op]._replace(form=form), f"{name}{form}", platform)
        for op, form in FORMS
    }


def cuda_kernel(signature: Signature, backend: str, platform: Platform) -> CudaKernel:
    """Return a backend of the tables, or register one of this name for a platform."""
    row = OPERATORS[signature.op].get(backend)
    if row is None:
        load, run = cuda_recurrence(signature, backend, platform)
        row = Backend(refuses=lambda problem: None, load=load, run=run)
    return CudaKernel(backend, signature, row)
