"""The CUDA kernels on tensor cores, in all of their forms, on the platform where a test wants them."""

from rwkv_train.ops.cuda import Platform
from rwkv_train.ops.cuda_recurrence import chunked
from tests.ops.exact_kernels import SIGNATURES, CudaKernel, cuda_kernel

CHUNKED_FORMS = [
    *(
        (op, form)
        for op in ("wkv5", "wkv6", "wkv7")
        for form in ("_chunked", "_chunked_whole", "_chunked_segments")
    ),
    ("wkv7", "_chunked_bf16"),
]
"""Operators, each with a form of its kernels; in ``_chunked`` and ``_chunked_bf16`` the source chooses by sizes."""


def chunked_kernels(platform: Platform, name: str) -> dict[tuple[str, str], CudaKernel]:
    """Register all forms for a platform, which may be done once; by operator and form.

    Args:
        name: of the backend of ``_chunked``, to which what follows that in a form's name is added: ``"cuda"`` gives
            those of the tables, ``cuda`` and ``cuda_bf16``, and two that no table has.
    """
    return {
        (op, form): cuda_kernel(
            chunked(SIGNATURES[op], form), f"{name}{form.removeprefix('_chunked')}", platform
        )
        for op, form in CHUNKED_FORMS
    }
