"""What is wrong with a run, gathered instead of ending at the first of it."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from rwkv_train.errors import RwkvTrainError

P = ParamSpec("P")
T = TypeVar("T")


class Problems:
    """The problems that checks have found so far."""

    def __init__(self) -> None:
        self.found: list[RwkvTrainError] = []
        """In the order of the checks; none says the same as another."""

    def add(self, error: RwkvTrainError) -> None:
        """Note a problem."""
        if str(error) not in map(str, self.found):
            self.found.append(error)

    def of(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what a check gives, or note what it raises and return ``None``."""
        try:
            return check(*args, **kwargs)
        except RwkvTrainError as error:
            self.add(error)
            return None

    def passes(self, check: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Note what a check raises, and tell whether it raised nothing."""
        try:
            check(*args, **kwargs)
        except RwkvTrainError as error:
            self.add(error)
            return False
        return True
