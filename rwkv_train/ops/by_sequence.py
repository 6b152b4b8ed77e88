"""Packed rows for a recurrence that knows plain batches only: one sequence after the other, each as a batch of one."""

import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops.backends import Kernel
from rwkv_train.ops.context import sequence_slices
from rwkv_train.ops.registration import Recurrence, register_recurrence

ONE_A_SEQUENCE = sys.maxsize
"""Tokens from one checkpoint to the next, where only the first state of a sequence is kept."""


def reference_recurrence(
    loop: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[str, ...], shared: Collection[str] = ()
) -> Kernel:
    """Return a loop over the tokens of a plain batch as a kernel, which is differentiable as the loop is.

    Args:
        loop: ``(*inputs) -> (y, final_state)``.
        inputs: names of its tensors, the last one ``"state"``.
        shared: names of those that have no row for each token.
    """

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        *given, state, cu_seqlens = arguments
        if cu_seqlens is None:
            return loop(*given, state)
        n_tokens = given[inputs.index("v")].shape[1]
        parts = [
            loop(*_of_sequence(given, inputs, shared, tokens), state[s : s + 1])
            for s, tokens in enumerate(sequence_slices(cu_seqlens, n_tokens))
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([final for _, final in parts])

    return run


def torch_recurrence(
    op: str,
    inputs: tuple[str, ...],
    *,
    shared: Collection[str] = (),
    checkpoint_tokens: Callable[[str], int],
    checkpoints_shape: Callable[..., tuple[int, ...]],
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
) -> Kernel:
    """Register the backend in plain tensor operations of an operator with PyTorch, as ``{op}_torch``.

    A packed row is computed sequence by sequence, for which a GPU is waited for once a call.

    Args:
        op: name of the operator.
        inputs: names of its tensors, the last one ``"state"``.
        shared: names of those that have no row for each token.
        checkpoint_tokens: device type -> tokens from one kept state to the next.
        checkpoints_shape: ``(*inputs) ->`` the shape of the checkpoints of a plain batch; that of one sequence has
            them in its first dimension.
        forward: ``(*inputs, keep_checkpoints) -> (y, final_state, checkpoints)`` of a plain batch.
        backward: ``(*inputs but the state, checkpoints, dy, d_final) ->`` the gradients of all inputs likewise.
    """
    value_index = inputs.index("v")

    def packed_shape(*arguments: Any) -> tuple[int, ...]:
        *given, state, cu_seqlens = arguments
        if cu_seqlens is None:
            return checkpoints_shape(*given, state)
        v = given[value_index]
        return v.shape[1] // checkpoint_tokens(v.device.type) + state.shape[0], *state.shape[1:]

    def packed_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, state, cu_seqlens, keep = arguments
        if cu_seqlens is None:
            return forward(*given, state, keep)
        v = given[value_index]
        n_kept = checkpoint_tokens(v.device.type)
        y, final_state = v.new_empty(v.shape), state.clone()
        checkpoints = state.new_zeros(packed_shape(*given, state, cu_seqlens) if keep else (0,))
        for s, tokens in _sequences_with_tokens(cu_seqlens, v.shape[1]):
            part = _of_sequence(given, inputs, shared, tokens)
            y[:, tokens], final_state[s], kept = forward(*part, state[s : s + 1], keep)
            if keep:
                checkpoints[_first_checkpoint(s, tokens, n_kept) :][: len(kept)] = kept
        return y, final_state, checkpoints

    def packed_backward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, cu_seqlens, checkpoints, dy, d_final = arguments
        if cu_seqlens is None:
            return backward(*given, checkpoints, dy, d_final)
        v = given[value_index]
        n_kept = checkpoint_tokens(v.device.type)
        # What is shared gets a sum over the sequences, which must not be rounded at each.
        wide = [
            x.to(checkpoints.dtype) if name in shared else x for x, name in zip(given, inputs, strict=False)
        ]
        gradients = [torch.zeros_like(x) for x in wide]
        d_state = d_final.clone()
        for s, tokens in _sequences_with_tokens(cu_seqlens, v.shape[1]):
            first = _first_checkpoint(s, tokens, n_kept)
            n_checkpoints = -(-(tokens.stop - tokens.start) // n_kept)
            *by_input, d_state[s] = backward(
                *_of_sequence(wide, inputs, shared, tokens),
                checkpoints[first : first + n_checkpoints],
                dy[:, tokens],
                d_final[s : s + 1],
            )
            for name, whole, part in zip(inputs, gradients, by_input, strict=False):
                (whole if name in shared else whole[:, tokens]).add_(part)
        return *(x.to(like.dtype) for x, like in zip(gradients, given, strict=True)), d_state

    return register_recurrence(
        Recurrence(
            name=f"{op}_torch",
            inputs=inputs,
            dispatch_key="CompositeExplicitAutograd",
            checkpoints_shape=packed_shape,
            forward=packed_forward,
            backward=packed_backward,
        )
    )


def _of_sequence(
    given: Iterable[Tensor], inputs: tuple[str, ...], shared: Collection[str], tokens: slice
) -> list[Tensor]:
    """Cut the inputs of one sequence out of those of the row; the state is not among them."""
    return [x if name in shared else x[:, tokens] for x, name in zip(given, inputs, strict=False)]


def _sequences_with_tokens(cu_seqlens: Tensor, n_tokens: int) -> Iterable[tuple[int, slice]]:
    slices = enumerate(sequence_slices(cu_seqlens, n_tokens))
    return ((s, tokens) for s, tokens in slices if tokens.start < tokens.stop)


def _first_checkpoint(s: int, tokens: slice, n_kept: int) -> int:
    """Return where the checkpoints of a sequence begin: there is room for all that lie before, without counting."""
    return int(tokens.start) // n_kept + s
