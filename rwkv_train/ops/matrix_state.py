"""What the operators with a matrix state for each head share: the state before a text, and the call of a backend."""

import torch
from torch import Tensor

from rwkv_train.ops.backends import kernel_for, problem_of
from rwkv_train.ops.context import SequenceContext, count_sequences


def zero_matrix_state(
    batch_size: int,
    n_head: int,
    head_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the state before a text: zeros, ``[B, H, N, N]``."""
    return torch.zeros(batch_size, n_head, head_size, head_size, device=device, dtype=dtype)


def run_with_matrix_state(
    op: str, inputs: tuple[Tensor, ...], state: Tensor | None, context: SequenceContext, backend: str
) -> tuple[Tensor, Tensor]:
    """Run an operator on inputs of checked shapes, from a state that is checked here.

    Args:
        op: name of the operator.
        inputs: its tensors but the state; the first four are r, w, k, v, with r, k, v ``[B, T, H, N]``.
        state: state before the first token, ``[B, H, N, N]`` in float32 (float64 where v is); zeros if ``None``.
        context: where sequences start; of a packed row the state is ``[S, H, N, N]``.
        backend: a name from the operator's table, or ``"auto"``.

    Returns:
        ``(y, final_state)``: ``y`` is ``[B, T, H, N]`` in the dtype of v, ``final_state`` like ``state``.

    Raises:
        ValueError: the state has another shape or dtype, or the context does not fit the inputs.
        BackendError: ``backend`` cannot run this problem.
    """
    v = inputs[3]
    batch, n_tokens, n_head, head_size = v.shape
    n_states = count_sequences(context, batch)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = zero_matrix_state(n_states, n_head, head_size, v.device, dtype)
    shape = (n_states, n_head, head_size, head_size)
    if state.shape != shape or state.dtype != dtype:
        raise ValueError(
            f"state must be {dtype} of shape {shape}, got {state.dtype} of shape {tuple(state.shape)}"
        )
    if n_tokens == 0:
        return v.clone(), state.clone()
    problem = problem_of(v, head_size, is_packed=context.cu_seqlens is not None, n_sequences=n_states)
    return kernel_for(op, problem, backend)(*inputs, state, context.cu_seqlens)
