"""The C++ backend of a recurrence, made from the functions that its source exports.

The source ``cuda/OP/OP_cpu.cpp`` of the operator ``OP`` computes in float32 and exports three of them::

    rwkv_OP_checkpoint_tokens() -> tokens from one kept state to the next
    rwkv_OP_forward(S, *sizes of a token of v, cu_seqlens, *inputs, y, final_state, checkpoints or null, n_threads)
    rwkv_OP_backward(S, *sizes of a token of v, cu_seqlens, *inputs but the state, checkpoints, dy, d_final,
                     *gradients, n_threads)

The gradients are those of all inputs, the state's the last; sequences and checkpoints as in ``compiled.py``.
"""

import ctypes
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops.backends import Kernel
from rwkv_train.ops.compiled import Signature, addresses
from rwkv_train.ops.context import sequence_slices
from rwkv_train.ops.cpp import argument_types, as_float32, load_cpp_library
from rwkv_train.ops.registration import Recurrence, register_recurrence


def cpp_recurrence(
    op: str,
    inputs: tuple[str, ...],
    *,
    n_sizes: int,
    checkpoint_tokens: int,
    shared: Collection[str] = (),
) -> tuple[Callable[[], ctypes.CDLL], Kernel]:
    """Register the C++ backend of an operator with PyTorch, as ``{op}_cpp``. Nothing is built yet.

    Args:
        op: name of the operator, which is also that of its source.
        inputs: names of its tensors in the order of the source, the last one ``"state"``.
        n_sizes: number of sizes of a token of ``v``.
        checkpoint_tokens: tokens from one kept state to the next; the source says the same, which loading checks.
        shared: names of the inputs that have no row for each token. The source leaves a row of their gradient for
            each sequence, ``[S, *shape]``; the rows are added up here.

    Returns:
        ``(load, run)``: ``load()`` returns the library, built on first use, and raises ``BackendError`` where it
        cannot be built; ``run(*inputs, cu_seqlens)`` returns ``(y, final_state)``.
    """
    signature = Signature(op, inputs, n_sizes, checkpoint_tokens, shared)
    value_index = signature.value_index
    forward_name, backward_name = f"rwkv_{op}_forward", f"rwkv_{op}_backward"

    @functools.cache
    def load() -> ctypes.CDLL:
        library = load_cpp_library(op)
        signature.check(library)
        # Beside the inputs: cu_seqlens and y, final_state, checkpoints; or checkpoints, dy, d_final for the state,
        # and gradients.
        n_tensors = {forward_name: len(inputs) + 4, backward_name: len(inputs) + 3 + len(inputs)}
        for name, count in n_tensors.items():
            launcher = getattr(library, name)
            launcher.argtypes = argument_types(1 + n_sizes, count)
            launcher.restype = None
        return library

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, cu_seqlens, keep_checkpoints = arguments
        v, state = given[value_index], given[-1]
        starts = _starts(v, cu_seqlens)
        y = v.new_empty(v.shape, dtype=torch.float32)
        final_state = state.new_empty(state.shape, dtype=torch.float32)
        checkpoints = final_state.new_empty(
            signature.checkpoints_shape(*given, cu_seqlens) if keep_checkpoints else (0,)
        )
        read = [as_float32(x) for x in given]
        written = (y, final_state, checkpoints if keep_checkpoints else None)
        launch = getattr(load(), forward_name)
        launch(state.shape[0], *v.shape[2:], *addresses(starts, *read, *written), torch.get_num_threads())
        return y.to(v.dtype), final_state, checkpoints

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, cu_seqlens, checkpoints, dy, d_final = arguments
        v, like = given[value_index], (*given, d_final)
        starts, n_sequences = _starts(v, cu_seqlens), d_final.shape[0]
        read = [as_float32(x) for x in (*given, checkpoints, dy, d_final)]
        written = [v.new_empty(shape, dtype=torch.float32) for shape in signature.gradient_shapes(like)]
        launch = getattr(load(), backward_name)
        launch(n_sequences, *v.shape[2:], *addresses(starts, *read, *written), torch.get_num_threads())
        return signature.finished(written, like)

    run = register_recurrence(
        Recurrence(
            name=f"{op}_cpp",
            inputs=inputs,
            dispatch_key="CPU",
            checkpoints_shape=signature.checkpoints_shape,
            forward=forward,
            backward=backward,
        )
    )
    return load, run


def _starts(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return where each sequence of a batch starts if its rows stand one after another, and where the last ends.

    Raises:
        ValueError: ``cu_seqlens`` does not go from 0 to the number of tokens, or falls: a kernel would read and write
            beyond its tensors.
    """
    batch, n_tokens = v.shape[:2]
    if cu_seqlens is None:
        return torch.arange(batch + 1, device="cpu") * n_tokens
    sequence_slices(cu_seqlens, n_tokens)
    return cu_seqlens.contiguous()
