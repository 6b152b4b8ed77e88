"""The C++ backend of a recurrence, made from the functions that its source exports.

The source ``cuda/OP/OP_cpu.cpp`` of the operator ``OP`` computes in float32 and exports three of them::

    rwkv_OP_checkpoint_tokens() -> tokens from one kept state to the next
    rwkv_OP_forward(*sizes of v, *inputs, y, final_state, checkpoints or null, n_threads)
    rwkv_OP_backward(*sizes of v, *inputs but the state, checkpoints, dy, d_final, *gradients, n_threads)

Checkpoints are states, counted in a dimension before the last two. The gradients are those of all inputs, the state's
the last.
"""

import ctypes
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops.backends import Kernel
from rwkv_train.ops.cpp import addresses, argument_types, as_float32, load_cpp_library
from rwkv_train.ops.registration import Recurrence, register_recurrence


def cpp_recurrence(
    op: str,
    inputs: tuple[str, ...],
    *,
    n_sizes: int,
    checkpoint_tokens: int,
    without_batch: Collection[str],
) -> tuple[Callable[[], ctypes.CDLL], Kernel]:
    """Register the C++ backend of an operator with PyTorch, as ``{op}_cpp``. Nothing is built yet.

    Args:
        op: name of the operator, which is also that of its source.
        inputs: names of its tensors in the order of the source, the last one ``"state"``.
        n_sizes: number of dimensions of ``v``.
        checkpoint_tokens: tokens from one kept state to the next; the source says the same, which loading checks.
        without_batch: names of the inputs that all sequences share. The source leaves a row of their gradient for
            each sequence, ``[B, *shape]``; the rows are added up here.

    Returns:
        ``(load, run)``: ``load()`` returns the library, built on first use, and raises ``BackendError`` where it
        cannot be built; ``run(*inputs)`` returns ``(y, final_state)``.
    """
    value_index = inputs.index("v")
    forward_name, backward_name = f"rwkv_{op}_forward", f"rwkv_{op}_backward"

    @functools.cache
    def load() -> ctypes.CDLL:
        library = load_cpp_library(op)
        assert getattr(library, f"rwkv_{op}_checkpoint_tokens")() == checkpoint_tokens
        # Beside the inputs: y, final_state, checkpoints; or checkpoints, dy, d_final for the state, and gradients.
        n_tensors = {forward_name: len(inputs) + 3, backward_name: len(inputs) + 2 + len(inputs)}
        for name, count in n_tensors.items():
            launcher = getattr(library, name)
            launcher.argtypes = argument_types(n_sizes, count)
            launcher.restype = None
        return library

    def checkpoints_shape(*given: Tensor) -> tuple[int, ...]:
        n_checkpoints = (given[value_index].shape[1] + checkpoint_tokens - 1) // checkpoint_tokens
        *outer, rows, columns = given[-1].shape
        return *outer, n_checkpoints, rows, columns

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, keep_checkpoints = arguments
        v, state = given[value_index], given[-1]
        y = v.new_empty(v.shape, dtype=torch.float32)
        final_state = state.new_empty(state.shape, dtype=torch.float32)
        checkpoints = final_state.new_empty(checkpoints_shape(*given) if keep_checkpoints else (0,))
        read = [as_float32(x) for x in given]
        written = (y, final_state, checkpoints if keep_checkpoints else None)
        launch = getattr(load(), forward_name)
        launch(*v.shape, *addresses(*read, *written), torch.get_num_threads())
        return y.to(v.dtype), final_state, checkpoints

    def backward(*arguments: Tensor) -> tuple[Tensor, ...]:
        *given, _checkpoints, _dy, d_final = arguments
        v, like = given[value_index], (*given, d_final)
        by_row = [name in without_batch for name in inputs]
        shapes = [(v.shape[0], *x.shape) if rows else x.shape for x, rows in zip(like, by_row, strict=True)]
        read = [as_float32(x) for x in arguments]
        written = [v.new_empty(shape, dtype=torch.float32) for shape in shapes]
        launch = getattr(load(), backward_name)
        launch(*v.shape, *addresses(*read, *written), torch.get_num_threads())
        gradients = (x.sum(0) if rows else x for x, rows in zip(written, by_row, strict=True))
        return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, like, strict=True))

    run = register_recurrence(
        Recurrence(
            name=f"{op}_cpp",
            inputs=inputs,
            dispatch_key="CPU",
            checkpoints_shape=checkpoints_shape,
            forward=forward,
            backward=backward,
        )
    )
    return load, run
