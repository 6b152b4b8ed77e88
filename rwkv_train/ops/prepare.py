"""All operators, and the loading of their backends ahead of the first step."""

from rwkv_train.ops import wkv4, wkv5, wkv6, wkv7
from rwkv_train.ops.backends import Problem, ResolvedBackend, prepare

OPERATORS = {
    "wkv4": wkv4.BACKENDS,
    "wkv5": wkv5.BACKENDS,
    "wkv6": wkv6.BACKENDS,
    "wkv7": wkv7.BACKENDS,
}
"""Name -> table of backends."""


def prepare_backend(op: str, problem: Problem, name: str) -> ResolvedBackend:
    """Choose and load (where needed build) a backend; safe to call as often as one likes.

    Args:
        op: a name from :data:`OPERATORS`.
        problem: what is to be computed.
        name: a name from the operator's table, or ``"auto"``.

    Returns:
        The name to pass as ``backend``, and one sentence that says why.

    Raises:
        BackendError: ``name`` cannot run the problem, or cannot be loaded on this machine.
    """
    return prepare(op, problem, name)
