"""What ``torch.compile`` is told about our functions, without loading it."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_traced(function: F) -> F:
    """Have traced code call a function once, while it is traced, and keep what it returned.

    As ``torch.compiler.assume_constant_result``, which sets the same mark but first imports the whole compiler: more
    than a second of every start that loads a model, and few of them compile anything.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
