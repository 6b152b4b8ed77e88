"""The RWKV-7 recurrence: a matrix state for each head, changed by a generalized delta rule."""

from torch import Tensor

from rwkv_train.ops.backends import AUTO, Backend, register_operator
from rwkv_train.ops.by_sequence import reference_recurrence
from rwkv_train.ops.context import SequenceContext
from rwkv_train.ops.cpp import refuses_cpp
from rwkv_train.ops.cuda import refuses_cuda, refuses_cuda_exact
from rwkv_train.ops.matrix_state import run_with_matrix_state, zero_matrix_state
from rwkv_train.ops.wkv7 import cpp, cuda
from rwkv_train.ops.wkv7.chunked import wkv7_torch
from rwkv_train.ops.wkv7.reference import wkv7_reference

_loop = reference_recurrence(wkv7_reference, ("r", "w", "k", "v", "a", "b", "state"))

# Fastest first. A new backend is one line here and one file beside this one.
BACKENDS = {
    "cuda": Backend(refuses=refuses_cuda, load=cuda.load_cuda, run=cuda.wkv7_cuda),
    "cuda_bf16": Backend(refuses=refuses_cuda, load=cuda.load_bf16, run=cuda.wkv7_cuda_bf16, in_auto=False),
    "cuda_exact": Backend(refuses=refuses_cuda_exact, load=cuda.load_exact, run=cuda.wkv7_cuda_exact),
    "cpp": Backend(refuses=refuses_cpp, load=cpp.load, run=cpp.wkv7_cpp),
    "torch": Backend(refuses=lambda problem: None, load=lambda: None, run=wkv7_torch),
    "reference": Backend(refuses=lambda problem: None, load=lambda: None, run=_loop),
}
register_operator("wkv7", BACKENDS)

wkv7_zero_state = zero_matrix_state


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    context: SequenceContext,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Mix each head's tokens through a matrix state with a generalized delta rule.

    For one head, with the state ``S`` indexed ``[value, key]``::

        S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T
        y_t = S_t r_t

    Computed in float32, or in float64 where ``v`` is float64. Every argument may be of any floating dtype and
    gets its gradient in that dtype. There is no second derivative except with ``reference``. ``cuda`` takes r, k, v,
    a, b in bfloat16, to which it brings others, and adds up in float32 products of numbers of 8 bits or, where that
    would be too few, 16; with ``cuda_bf16`` all have 8. Both need ``w`` to be -3 or more whatever the size of
    gradients, or -5 or more where these are not much smaller than 1: below, gradients may be lost, and outputs become
    inf or NaN, as the product of the decays of 16 tokens underflows. A model's are above -0.61.

    Args:
        r: receptance, ``[B, T, H, N]``.
        w: log decay, ``[B, T, H, N]``, every value <= 0. Not the raw decay and not ``log(-w)``. Best float32
            even where the rest is bfloat16, also under autocast, which casts nothing here.
        k: key, ``[B, T, H, N]``.
        v: value, ``[B, T, H, N]``.
        a: the key to remove, ``[B, T, H, N]``; the model passes ``-kk`` with ``|kk| = 1``.
        b: the key to write what was removed to, ``[B, T, H, N]``; the model passes ``kk`` times its gate.
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
        Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
    """
    if any(x.shape != r.shape for x in (w, k, v, a, b)) or r.dim() != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (r, w, k, v, a, b))
        raise ValueError(f"r, w, k, v, a, b must have one shape [B, T, H, N], got {shapes}")
    return run_with_matrix_state("wkv7", (r, w, k, v, a, b), state, context, backend)
