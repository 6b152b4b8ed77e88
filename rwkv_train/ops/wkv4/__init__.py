"""The RWKV-4 recurrence: an exponentially weighted mean of past values for each channel."""

import torch
from torch import Tensor

from rwkv_train.ops.backends import AUTO, Backend, kernel_for, problem_of, register_operator
from rwkv_train.ops.by_sequence import reference_recurrence
from rwkv_train.ops.context import SequenceContext, count_sequences
from rwkv_train.ops.cpp import refuses_cpp
from rwkv_train.ops.cuda import refuses_cuda_exact
from rwkv_train.ops.wkv4 import cpp, cuda
from rwkv_train.ops.wkv4.chunked import wkv4_torch
from rwkv_train.ops.wkv4.reference import wkv4_reference

EMPTY_LOG_SCALE = -1e38
"""Log scale of sums to which nothing has been added: exp of it is 0, and it stays finite in a subtraction."""

_loop = reference_recurrence(wkv4_reference, ("w", "u", "k", "v", "state"), shared=("w", "u"))

# Fastest first. A new backend is one line here and one file beside this one.
BACKENDS = {
    "cuda_exact": Backend(refuses=refuses_cuda_exact, load=cuda.load, run=cuda.wkv4_cuda_exact),
    "cpp": Backend(refuses=refuses_cpp, load=cpp.load, run=cpp.wkv4_cpp),
    "torch": Backend(refuses=lambda problem: None, load=lambda: None, run=wkv4_torch),
    "reference": Backend(refuses=lambda problem: None, load=lambda: None, run=_loop),
}
register_operator("wkv4", BACKENDS)


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    context: SequenceContext,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Mix each channel's tokens by a mean whose weights decay with age.

    For one channel, with the sums ``A`` and ``B`` over the past::

        y_t = (A_{t-1} + exp(u + k_t) v_t) / (B_{t-1} + exp(u + k_t))
        A_t = exp(w) A_{t-1} + exp(k_t) v_t
        B_t = exp(w) B_{t-1} + exp(k_t)

    The state holds ``(numerator, denominator, p)``: ``A = numerator * exp(p)``, ``B = denominator * exp(p)``.
    The final log scale ``p`` is a constant to the gradient: right for whatever uses the state only through
    ``A`` and ``B``, as this operator does.

    Computed in float32, or in float64 where ``v`` is float64. Every argument may be of any floating dtype and
    gets its gradient in that dtype. There is no second derivative except with ``reference``.

    Args:
        w: log decay, ``[C]``, every value <= 0; the model passes ``-exp(time_decay)``.
        u: bonus of the current token, ``[C]``, added to its key; the model's ``time_first``.
        k: log weight of the token, ``[B, T, C]``.
        v: value, ``[B, T, C]``.
        state: state before the first token, ``[B, 3, C]`` in float32 (float64 where ``v`` is); that of
            :func:`wkv4_zero_state` if ``None``.
        context: where sequences start; of a packed row (B = 1) of S sequences the states are ``[S, 3, C]``.
        backend: a name from ``BACKENDS``, or ``"auto"`` for the fastest one that fits.

    Returns:
        ``(y, final_state)``: ``y`` is ``[B, T, C]`` in the dtype of ``v``; ``final_state`` is like ``state``.

    Raises:
        ValueError: the shapes or the context disagree, or the state has another dtype.
        BackendError: ``backend`` cannot run this problem.

    Source:
        Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.
    """
    if k.dim() != 3 or v.shape != k.shape or w.shape != k.shape[2:] or u.shape != k.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (w, u, k, v))
        raise ValueError(f"w and u must be [C], k and v [B, T, C], got {shapes}")
    batch, _, n_embd = k.shape
    n_states = count_sequences(context, batch)
    state_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = wkv4_zero_state(n_states, n_embd, v.device, state_dtype)
    if state.shape != (n_states, 3, n_embd) or state.dtype != state_dtype:
        raise ValueError(
            f"state must be {state_dtype} of shape {(n_states, 3, n_embd)}, "
            f"got {state.dtype} of shape {tuple(state.shape)}"
        )
    if v.shape[1] == 0:
        return v.clone(), state.clone()
    problem = problem_of(v, None, is_packed=context.cu_seqlens is not None, n_sequences=n_states)
    return kernel_for("wkv4", problem, backend)(w, u, k, v, state, context.cu_seqlens)


def wkv4_zero_state(
    batch_size: int,
    n_embd: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the state before a text: empty sums, ``[B, 3, C]``, with a log scale of -1e38."""
    state = torch.zeros(batch_size, 3, n_embd, device=device, dtype=dtype)
    state[:, 2] = EMPTY_LOG_SCALE
    return state
