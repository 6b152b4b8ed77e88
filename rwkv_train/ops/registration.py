"""Register a recurrence with PyTorch: its schema, shape rule, gradient and behaviour under autocast.

Each recurrence becomes two operators, ``rwkv_train::NAME`` and ``rwkv_train::NAME_backward``. ``torch.compile``
takes them as they are and never looks inside.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rwkv_train.ops.backends import Kernel

R = TypeVar("R")

_LIBRARY = torch.library.Library("rwkv_train", "FRAGMENT")  # type: ignore[no-untyped-call]


class Recurrence(NamedTuple):
    """A recurrence that keeps some of its states (checkpoints) for its backward pass.

    The input named ``v`` gives ``y`` its shape and dtype.
    """

    name: str
    inputs: tuple[str, ...]
    """Names of the tensors, the last one ``"state"``."""
    dispatch_key: str
    """``"CPU"``, or ``"CompositeExplicitAutograd"`` for every device."""
    checkpoints_shape: Callable[..., Sequence[int]]
    """``(*inputs, cu_seqlens) ->`` the shape of the checkpoints. It may not depend on the values of cu_seqlens."""
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """``(*inputs, cu_seqlens, keep_checkpoints) -> (y, final_state, checkpoints)``; no checkpoints: an empty
    tensor."""
    backward: Callable[..., tuple[Tensor, ...]]
    """``(*inputs but the state, cu_seqlens, checkpoints, dy, d_final_state) ->`` the gradient of each input, the
    state too."""
    checkpoint_dtype: torch.dtype | None = None
    """Dtype of the checkpoints; ``None`` for that of the state."""


def register_recurrence(recurrence: Recurrence) -> Kernel:
    """Register a recurrence and return it as a function ``(*inputs, cu_seqlens) -> (y, final_state)``.

    ``cu_seqlens`` is ``None`` for a plain batch; see :class:`rwkv_train.ops.context.SequenceContext`.
    """
    name, inputs = recurrence.name, recurrence.inputs
    tensors = ", ".join(f"Tensor {argument}" for argument in inputs)
    saved = ", ".join(f"Tensor {argument}" for argument in inputs[:-1])
    gradients = ", ".join("Tensor" for _ in inputs)
    schemas = {
        name: (
            f"({tensors}, Tensor? cu_seqlens, bool keep_checkpoints) -> (Tensor, Tensor, Tensor)",
            recurrence.forward,
        ),
        f"{name}_backward": (
            f"({saved}, Tensor? cu_seqlens, Tensor checkpoints, Tensor dy, Tensor d_final) -> ({gradients})",
            recurrence.backward,
        ),
    }
    for operator, (schema, function) in schemas.items():
        _LIBRARY.define(operator + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(operator, without_autocast(function), recurrence.dispatch_key)  # type: ignore[no-untyped-call]
    forward_op = getattr(torch.ops.rwkv_train, name).default
    backward_op = getattr(torch.ops.rwkv_train, f"{name}_backward").default
    value_index = inputs.index("v")

    def forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, state, cu_seqlens, keep = arguments
        v = given[value_index]
        shape = recurrence.checkpoints_shape(*given, state, cu_seqlens) if keep else (0,)
        checkpoints = state.new_empty(shape, dtype=recurrence.checkpoint_dtype)
        return v.new_empty(v.shape), state.new_empty(state.shape), checkpoints

    def backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
        *given, _cu_seqlens, _checkpoints, _dy, d_final = arguments
        return tuple(x.new_empty(x.shape) for x in (*given, d_final))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, state, cu_seqlens, _keep = inputs
        ctx.save_for_backward(*given, cu_seqlens, output[2])
        ctx.state_shape, ctx.state_dtype = state.shape, state.dtype
        ctx.set_materialize_grads(False)  # zeros for the checkpoints would be large and unused

    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        *given, cu_seqlens, checkpoints = ctx.saved_tensors
        v = given[value_index]
        if dy is None:
            dy = v.new_zeros(v.shape)
        if d_final is None:
            d_final = v.new_zeros(ctx.state_shape, dtype=ctx.state_dtype)
        return (*backward_op(*given, cu_seqlens, checkpoints, dy, d_final), None, None)

    def refuse(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{name} has no second derivative; use the backend 'reference' for one")

    torch.library.register_fake(f"rwkv_train::{name}", forward_shapes, lib=_LIBRARY)
    torch.library.register_fake(f"rwkv_train::{name}_backward", backward_shapes, lib=_LIBRARY)
    torch.library.register_autograd(f"rwkv_train::{name}", backward, setup_context=save, lib=_LIBRARY)
    torch.library.register_autograd(f"rwkv_train::{name}_backward", refuse, lib=_LIBRARY)

    def kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, cu_seqlens = arguments
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        y, final_state, _ = forward_op(*tensors, cu_seqlens, keep)
        return y, final_state

    return kernel


def without_autocast(function: Callable[..., R]) -> Callable[..., R]:
    """Run with autocast off: an operator takes what it gets, and its inner products stay in float32."""

    def run(*arguments: Any) -> R:
        device_type = next(x for x in arguments if isinstance(x, Tensor)).device.type
        if not torch.is_autocast_enabled(device_type):
            return function(*arguments)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments)

    return run
