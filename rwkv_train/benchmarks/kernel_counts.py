"""What a recurrence has to move and to compute, whatever computes it: the ground of a roofline.

Bytes are those of a call's inputs and outputs, each once: no cache and no kernel can do with less. States kept
for a backward pass, reads that are repeated and intermediate tensors are what an implementation adds. Operations
are those of the formulas token by token (a product and a sum are two); a form in chunks does more of them, to do
them in matrix products. So both are the same for all that compute a recurrence, and rates can be compared.
"""

from typing import NamedTuple

from rwkv_train.benchmarks.kernel_sizes import NO_HEADS, KernelSize

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)

STATE_BYTES = 4
"""States are float32 whatever the rest is."""


class Tensors(NamedTuple):
    """Tensors of one pass that have every token, read or written: in the dtype of the values, and log decays."""

    values: int
    decays: int


_BY_TOKEN = {
    # r k v a b -> y; backward r k v a b dy -> dr dk dv da db, and w -> dw
    "wkv7": {"forward": Tensors(6, 1), "backward": Tensors(11, 2)},
    # r k v -> y; backward r k v dy -> dr dk dv, and w -> dw
    "wkv6": {"forward": Tensors(4, 1), "backward": Tensors(7, 2)},
    # the same with a decay for all tokens
    "wkv5": {"forward": Tensors(4, 0), "backward": Tensors(7, 0)},
    # k v -> y; backward k v dy -> dk dv
    "wkv4": {"forward": Tensors(3, 0), "backward": Tensors(5, 0)},
}


def bytes_per_token(op: str, direction: str, n_channels: int, value_bytes: int, decay_bytes: int = 4) -> int:
    """Count what one token of one head (of ``wkv4``: of all channels) makes a pass read and write.

    Args:
        op: ``"wkv4"`` to ``"wkv7"``.
        direction: ``"forward"`` or ``"backward"``.
        n_channels: N of a head, of ``wkv4`` C.
        value_bytes: of one number of r, k, v, a, b, y and their gradients.
        decay_bytes: of one log decay and its gradient, which the operators take in float32.

    Source:
        The arguments and results of :mod:`rwkv_train.ops`: each tensor once, gradients of all inputs.
    """
    values, decays = _BY_TOKEN[op][direction]
    return n_channels * (values * value_bytes + decays * decay_bytes)


def minimum_bytes(size: KernelSize, kind: str, value_bytes: int, decay_bytes: int = 4) -> int:
    """Count what a call must read and write at least: all that it is given and gives, once.

    A forward writes the final state, and reads none: a text begins without. Its backward has no gradient of the
    final state. Parameters (w, u) are read once a pass, and their gradients written once.

    Args:
        size: the problem.
        kind: one of ``PASSES``; forward and backward both count all that they share.
        value_bytes: of one number of the values, and of u.
        decay_bytes: of one log decay.
    """
    n_heads = 1 if size.op == NO_HEADS else size.H
    tokens = size.B * size.T * n_heads
    n_parameters = n_heads * size.N
    parameters = {
        "wkv7": 0,
        "wkv6": n_parameters * value_bytes,
        "wkv5": n_parameters * (value_bytes + decay_bytes),
        "wkv4": n_parameters * (value_bytes + decay_bytes),
    }[size.op]
    numbers_of_a_state = 3 * size.N if size.op == NO_HEADS else size.H * size.N**2
    final_states = (len(size.starts) - 1) * numbers_of_a_state * STATE_BYTES
    total = tokens * bytes_per_token(size.op, "forward", size.N, value_bytes, decay_bytes)
    total += parameters + final_states
    if kind == FORWARD_BACKWARD:
        total += tokens * bytes_per_token(size.op, "backward", size.N, value_bytes, decay_bytes)
        total += 2 * parameters
    return total


def operations_per_token(op: str, direction: str, n_channels: int) -> int:
    """Count the operations of one token of one head (of ``wkv4``: of all channels), by the formulas.

    With a matrix state, what is done to each of its N x N elements counts; what is done to the N numbers of a
    vector does not. With G the gradient of the state, ``backward`` rebuilds the states, which are N times what a
    forward gives, and then goes back through them::

        wkv7 forward   S_t = S diag(d) + (S a) b^T + v k^T   1 + 2 + 2 + 2,  y = S_t r   2     = 9
             backward  states again 7;  G += dy r^T   2;  G k, G b, G^T v, G^T (S a), S_t^T dy, S^T dsa   6 x 2
                       dw = d sum(G S)   2;  G diag(d) + dsa a^T   3                             = 26
        wkv6 forward   y = S r + v (sum u k r)   2;  S_t = S diag(d) + v k^T   1 + 2             = 5
        wkv5 backward  states again 3;  G k, G^T v, S^T dy   3 x 2
                       dw = d sum(G S)   2;  G diag(d) + dy r^T   3                              = 14

    ``wkv4``, a channel; an exponential counts as one, and the scaling that keeps sums finite is not counted::

        forward        e = exp(u + k), f = exp(k)   3;  A + e v, B + e   3;  divided   1
                       A = d A + f v, B = d B + f   5                                            = 12
        backward       forward again 12;  q = dy / (B + e)   1;  dv = f p + e q   3
                       dk = f (v p + s) + e (v - y) q   7;  du, dw   1 + 4
                       p = d p + q, s = d s - y q   2 + 3                                        = 33

    Source:
        The formulas of :mod:`rwkv_train.ops.wkv7` to ``wkv4``, differentiated.
    """
    if op == NO_HEADS:
        return n_channels * {"forward": 12, "backward": 33}[direction]
    by_element = {
        "wkv7": {"forward": 9, "backward": 26},
        "wkv6": {"forward": 5, "backward": 14},
        "wkv5": {"forward": 5, "backward": 14},
    }
    return n_channels**2 * by_element[op][direction]


def count_operations(size: KernelSize, kind: str) -> int:
    """Count the operations of a call, as :func:`operations_per_token` does."""
    tokens = size.B * size.T * (1 if size.op == NO_HEADS else size.H)
    directions = ("forward", "backward") if kind == FORWARD_BACKWARD else ("forward",)
    return tokens * sum(operations_per_token(size.op, direction, size.N) for direction in directions)
