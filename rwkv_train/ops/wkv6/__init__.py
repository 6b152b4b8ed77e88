"""The RWKV-6 recurrence: a matrix state for each head, with a decay for each key channel and token."""

from torch import Tensor

from rwkv_train.ops.backends import AUTO, Backend, register_operator
from rwkv_train.ops.by_sequence import reference_recurrence
from rwkv_train.ops.context import SequenceContext
from rwkv_train.ops.cpp import refuses_cpp
from rwkv_train.ops.cuda import refuses_cuda, refuses_cuda_exact
from rwkv_train.ops.matrix_state import run_with_matrix_state, zero_matrix_state
from rwkv_train.ops.wkv6 import cpp, cuda
from rwkv_train.ops.wkv6.chunked import wkv6_torch
from rwkv_train.ops.wkv6.reference import wkv6_reference

_loop = reference_recurrence(wkv6_reference, ("r", "w", "k", "v", "u", "state"), shared=("u",))

# Fastest first. A new backend is one line here and one file beside this one.
BACKENDS = {
    "cuda": Backend(refuses=refuses_cuda, load=cuda.load_cuda, run=cuda.wkv6_cuda),
    "cuda_exact": Backend(refuses=refuses_cuda_exact, load=cuda.load_exact, run=cuda.wkv6_cuda_exact),
    "cpp": Backend(refuses=refuses_cpp, load=cpp.load, run=cpp.wkv6_cpp),
    "torch": Backend(refuses=lambda problem: None, load=lambda: None, run=wkv6_torch),
    "reference": Backend(refuses=lambda problem: None, load=lambda: None, run=_loop),
}
register_operator("wkv6", BACKENDS)

wkv6_zero_state = zero_matrix_state


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    context: SequenceContext,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Mix each head's tokens through a matrix state that decays as each token says.

    For one head, with the state ``S`` indexed ``[value, key]``::

        y_t = (S_{t-1} + v_t (u * k_t)^T) r_t
        S_t = S_{t-1} diag(exp(w_t)) + v_t k_t^T

    Computed in float32, or in float64 where ``v`` is float64. Every argument may be of any floating dtype and
    gets its gradient in that dtype. There is no second derivative except with ``reference``. ``cuda`` takes r, k, v
    in bfloat16, to which it brings others, and adds up in float32 products of numbers rounded to bfloat16.

    Args:
        r: receptance, ``[B, T, H, N]``.
        w: log decay, ``[B, T, H, N]``, every value <= 0 and as low as one likes; the model passes ``-exp`` of its
            raw decay. Best float32 even where the rest is bfloat16, also under autocast, which casts nothing here.
        k: key, ``[B, T, H, N]``.
        v: value, ``[B, T, H, N]``.
        u: bonus of the current token, ``[H, N]``, which multiplies its key; the model's ``time_faaaa``.
        state: state before the first token, ``[B, H, N, N]`` in float32 (float64 where ``v`` is); zeros if
            ``None``.
        context: where sequences start; of a packed row (B = 1) of S sequences the states are ``[S, H, N, N]``.
        backend: a name from ``BACKENDS``, or ``"auto"`` for the fastest one that fits.

    Returns:
        ``(y, final_state)``: ``y`` is ``[B, T, H, N]`` in the dtype of ``v``, ``final_state`` like ``state``.

    Raises:
        ValueError: the shapes or the context disagree, or the state has another dtype.
        BackendError: ``backend`` cannot run this problem.

    Source:
        Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        arXiv:2404.05892 (Finch).
    """
    if r.dim() != 4 or any(x.shape != r.shape for x in (w, k, v)) or u.shape != r.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (r, w, k, v, u))
        raise ValueError(f"r, w, k, v must have one shape [B, T, H, N] and u [H, N], got {shapes}")
    return run_with_matrix_state("wkv6", (r, w, k, v, u), state, context, backend)
