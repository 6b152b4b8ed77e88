"""The CUDA backends of a recurrence, made from the functions that its sources export.

The source ``cuda/OP/OP.cu`` of the operator ``OP``, its exact kernels, exports, for S sequences with T tokens in all::

    rwkv_OP_checkpoint_tokens() -> tokens from one kept state to the next
    rwkv_OP_workspace_bytes(is_backward, S, T, *sizes of a token of v) -> bytes that the caller allocates
    rwkv_OP_forward(dtype, S, T, *sizes, cu_seqlens or null, *inputs, y, final_state, checkpoints or null, workspace,
                    stream) -> error
    rwkv_OP_backward(dtype, S, T, *sizes, cu_seqlens or null, *inputs but the state, checkpoints, dy, d_final,
                     *gradients, workspace, stream) -> error
    rwkv_OP_step(dtype, S, *sizes, *inputs, y, final_state, stream) -> error, of one token for each sequence
    rwkv_OP_error(error) -> what CUDA says of it

Log decay, bonus, states and their gradients are float32 there, all else is of ``dtype``. ``cu_seqlens`` stays on the
device: no value of it is read here, so that nothing is waited for and a CUDA graph can hold a call. Without it all
sequences have T / S tokens. The gradients are those of all inputs, the state's the last; sequences and checkpoints as
in ``compiled.py``.

``cuda/OP/OP_chunked.cu``, the kernels on tensor cores, has its own ``checkpoint_tokens``, ``workspace_bytes``,
``forward`` and ``backward``, whose names end in ``_chunked`` and the like (see :func:`chunked`). What is of ``dtype``
must be bfloat16 there, and so are the checkpoints. A single token without gradients is the exact ``step`` in any form.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops.backends import Kernel
from rwkv_train.ops.compiled import Signature, addresses
from rwkv_train.ops.cuda import CUDA, DTYPE_CODES, Platform, raise_on_error
from rwkv_train.ops.registration import Recurrence, register_recurrence

FLOAT32_INPUTS = ("w", "u", "state")
"""Inputs that a kernel reads in float32 whatever the dtype of the others: a decay is rounded at every token."""
ALIGNMENT = 16
"""Bytes that a kernel may read at once. A view may begin anywhere in its memory; what is allocated is aligned."""
CHUNKED_CHECKPOINT_TOKENS = 64


def chunked(signature: Signature, form: str = "_chunked") -> Signature:
    """Return the signature of an operator's kernels on tensor cores, from that of its exact ones.

    All that is not in ``FLOAT32_INPUTS`` is brought to bfloat16 before it is read, whatever its dtype.

    Args:
        signature: of the exact kernels.
        form: ``"_chunked"``, which chooses between the next two by sizes; ``"_chunked_whole"``, in which a block takes
            a sequence through all of its tokens; ``"_chunked_segments"``, in which blocks take segments of a sequence
            side by side; of wkv7 also ``"_chunked_bf16"``, which rounds the factors of every product to bfloat16.
    """
    return signature._replace(
        form=form,
        family="_chunked",
        checkpoint_tokens=CHUNKED_CHECKPOINT_TOKENS,
        checkpoint_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
    )


def cuda_recurrence(
    signature: Signature, backend: str, platform: Platform = CUDA
) -> tuple[Callable[[], ctypes.CDLL], Kernel]:
    """Register a CUDA backend of an operator with PyTorch, as ``{op}_{backend}``. Nothing is built yet.

    Args:
        signature: how the source takes its tensors.
        backend: what the operator calls it.
        platform: where its kernels run.

    Returns:
        ``(load, run)``: ``load()`` returns the library, built on first use, and raises ``BackendError`` where it
        cannot be built; ``run(*inputs, cu_seqlens)`` returns ``(y, final_state)``.
    """
    op, inputs, value_index = signature.op, signature.inputs, signature.value_index

    @functools.cache
    def load() -> ctypes.CDLL:
        library = platform.load_library(op)
        declare(library, signature)
        signature.check(library)
        return library

    def launch(name: str, device: torch.device, *arguments: Any) -> None:
        library = load()
        function = getattr(library, f"rwkv_{op}_{name}")
        code = function(*arguments, platform.current_stream(device))
        raise_on_error(library, op, name, code)

    def workspace(is_backward: bool, v: Tensor, n_sequences: int) -> Tensor:
        n_bytes = getattr(load(), f"rwkv_{op}_workspace_bytes{signature.form}")
        size = n_bytes(is_backward, n_sequences, v.shape[0] * v.shape[1], *v.shape[2:])
        return v.new_empty(size, dtype=torch.uint8)

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, cu_seqlens, keep_checkpoints = arguments
        v, state = given[value_index], given[-1]
        check_places(inputs, given, cu_seqlens)
        final_state = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
        checkpoints = final_state.new_empty(
            signature.checkpoints_shape(*given, cu_seqlens) if keep_checkpoints else (0,),
            dtype=signature.checkpoint_dtype,
        )
        if v.numel() == 0:  # nothing to launch
            return v.new_empty(v.shape), final_state.copy_(state), checkpoints
        dtype = signature.dtype or _common_dtype(inputs, given)
        y = v.new_empty(v.shape, dtype=dtype)
        with platform.on_device(v.device):
            read = [_as_read(name, x, dtype) for name, x in zip(inputs, given, strict=True)]
            code, n_sequences, (batch, n_tokens, *sizes) = DTYPE_CODES[dtype], state.shape[0], v.shape
            if n_tokens == 1 and cu_seqlens is None and not keep_checkpoints:
                launch("step", v.device, code, n_sequences, *sizes, *addresses(*read, y, final_state))
            else:
                starts = None if cu_seqlens is None else cu_seqlens.contiguous()
                written = (y, final_state, checkpoints if keep_checkpoints else None)
                tensors = (starts, *read, *written, workspace(False, v, n_sequences))
                launch(
                    f"forward{signature.form}",
                    v.device,
                    code,
                    n_sequences,
                    batch * n_tokens,
                    *sizes,
                    *addresses(*tensors),
                )
        return y.to(v.dtype), final_state, checkpoints

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, cu_seqlens, checkpoints, dy, d_final = arguments
        v, like = given[value_index], (*given, d_final)
        check_places((*inputs[:-1], "dy", "d_final"), (*given, dy, d_final), cu_seqlens)
        if v.numel() == 0:
            return *(torch.zeros_like(x) for x in given), d_final.clone()
        dtype = signature.dtype or _common_dtype(inputs, given)
        with platform.on_device(v.device):
            read = [_as_read(name, x, dtype) for name, x in zip(inputs, given, strict=False)]
            read += [checkpoints.contiguous(), _as_read("dy", dy, dtype), _as_read("state", d_final, dtype)]
            written = [
                v.new_empty(shape, dtype=torch.float32 if name in FLOAT32_INPUTS else dtype)
                for name, shape in zip(inputs, signature.gradient_shapes(like), strict=True)
            ]
            n_sequences, (batch, n_tokens, *sizes) = d_final.shape[0], v.shape
            starts = None if cu_seqlens is None else cu_seqlens.contiguous()
            tensors = (starts, *read, *written, workspace(True, v, n_sequences))
            launch(
                f"backward{signature.form}",
                v.device,
                DTYPE_CODES[dtype],
                n_sequences,
                batch * n_tokens,
                *sizes,
                *addresses(*tensors),
            )
            return signature.finished(written, like)

    run = register_recurrence(
        Recurrence(
            name=f"{op}_{backend}",
            inputs=inputs,
            dispatch_key=platform.dispatch_key,
            checkpoints_shape=signature.checkpoints_shape,
            forward=forward,
            backward=backward,
            checkpoint_dtype=signature.checkpoint_dtype,
        )
    )
    return load, run


def declare(library: ctypes.CDLL, signature: Signature) -> None:
    """Tell ctypes the types of a library's functions."""
    op, n_inputs = signature.op, len(signature.inputs)
    integer, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    sizes, form = (integer,) * signature.n_sizes, signature.form
    # Beside the inputs: cu_seqlens and y, final_state, checkpoints, workspace; or cu_seqlens and checkpoints, dy,
    # d_final for the state, gradients, workspace; or y, final_state. The stream is the last of each.
    types: dict[str, tuple[type | None, Sequence[type]]] = {
        f"checkpoint_tokens{signature.family}": (integer, ()),
        f"workspace_bytes{form}": (size, (integer, integer, size, *sizes)),
        f"forward{form}": (integer, (integer, integer, size, *sizes, *(address,) * (n_inputs + 6))),
        f"backward{form}": (integer, (integer, integer, size, *sizes, *(address,) * (2 * n_inputs + 5))),
        "step": (integer, (integer, integer, *sizes, *(address,) * (n_inputs + 3))),
        "error": (ctypes.c_char_p, (integer,)),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, f"rwkv_{op}_{name}")
        function.restype, function.argtypes = result, arguments


def _common_dtype(inputs: Sequence[str], given: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that the kernel reads: that of all inputs, or float32 where they differ, which rounds none."""
    dtypes = {x.dtype for name, x in zip(inputs, given, strict=False) if name not in FLOAT32_INPUTS}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _as_read(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an input as the kernel reads it: without gaps, several numbers at a time."""
    x = x.to(torch.float32 if name in FLOAT32_INPUTS else dtype).contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def check_places(names: Sequence[str], tensors: Sequence[Tensor], cu_seqlens: Tensor | None) -> None:
    """Refuse what would let a kernel read memory that is not its own.

    Raises:
        ValueError: the tensors are not on one device, or ``cu_seqlens`` is not of int64.
    """
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int64:
            raise ValueError(f"cu_seqlens must be torch.int64, not {cu_seqlens.dtype}")
        names, tensors = (*names, "cu_seqlens"), (*tensors, cu_seqlens)
    for name, x in zip(names, tensors, strict=True):
        if x.device != tensors[0].device:
            raise ValueError(
                f"all tensors must be on one device: {names[0]} is on {tensors[0].device}, {name} on {x.device}"
            )
