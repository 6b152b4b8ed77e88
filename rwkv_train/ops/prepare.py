"""Load an operator's backend ahead of the first step, by the operator's name."""

from rwkv_train.ops.backends import Problem, ResolvedBackend
from rwkv_train.ops.wkv4 import prepare_wkv4
from rwkv_train.ops.wkv7 import prepare_wkv7

OPERATORS = {"wkv4": prepare_wkv4, "wkv7": prepare_wkv7}


def prepare_backend(op: str, problem: Problem, name: str) -> ResolvedBackend:
    """Choose and load (where needed build) a backend; safe to call as often as one likes.

    Args:
        op: ``"wkv4"`` or ``"wkv7"``.
        problem: what is to be computed.
        name: a name from the operator's table, or ``"auto"``.

    Returns:
        The name to pass as ``backend``, and one sentence that says why.

    Raises:
        BackendError: ``name`` cannot run the problem, or cannot be loaded on this machine.
    """
    return OPERATORS[op](problem, name)
