"""Which linear layers of a model get an adapter, and of which rank."""

import difflib
import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

from torch import nn

from rwkv_train.config.methods import LoraMethod
from rwkv_train.errors import ConfigError

ValueT = TypeVar("ValueT", int, float)


class Target(NamedTuple):
    """The adapter that one linear layer gets."""

    n_inputs: int
    n_outputs: int
    rank: int
    alpha: float

    def scale(self, method: LoraMethod) -> float:
        """Return what the product of the two matrices is multiplied by: alpha / r, or alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if method.rslora else self.rank)

    def count_parameters(self, method: LoraMethod) -> int:
        """Count the values that are learned."""
        if method.variant == "miss":
            return self.rank * self.n_outputs
        lengths = self.n_outputs if method.variant == "dora" else 0
        return self.rank * (self.n_inputs + self.n_outputs) + lengths


def find_targets(model: nn.Module, method: LoraMethod) -> dict[str, Target]:
    """Return the linear layers that get an adapter, by name, in the order of the model.

    Args:
        model: a model without adapters, on any device; only names and sizes are looked at.
        method: what is asked for.

    Raises:
        ConfigError: a pattern fits no layer, or a rank is too large for one.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in method.targets:
        _require_a_fit("targets", pattern, layers, "linear layer")
    names = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in method.targets)]
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, setting):
            _require_a_fit(setting, pattern, names, "layer of finetune.targets")
    return {name: _target(name, layers[name], method) for name in names}


def last_fit(name: str, patterns: Mapping[str, ValueT], otherwise: ValueT) -> ValueT:
    """Return the value of the last pattern that fits a name.

    Example:
        >>> last_fit("blocks.0.att.key", {"blocks.*": 8, "*.key": 4}, 16)
        4
    """
    return next((patterns[each] for each in reversed(list(patterns)) if fnmatchcase(name, each)), otherwise)


def _target(name: str, layer: nn.Linear, method: LoraMethod) -> Target:
    rank = last_fit(name, method.rank_pattern, method.rank)
    n_inputs, n_outputs = layer.in_features, layer.out_features
    # The matrix of MiSS has a row for each channel of a block of inputs, and is no product of two.
    limit = n_inputs if method.variant == "miss" else min(n_inputs, n_outputs)
    if rank > limit:
        raise ConfigError(
            f"finetune.rank ({rank}) is too large for {name}, a layer of {n_inputs} inputs and {n_outputs} outputs; "
            f"the variant {method.variant!r} can have at most {limit} there"
        )
    return Target(n_inputs, n_outputs, rank, last_fit(name, method.alpha_pattern, method.alpha))


def _require_a_fit(setting: str, pattern: str, names: Collection[str], what: str) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
    raise ConfigError(f"finetune.{setting}: '{pattern}' fits no {what}; near it are {', '.join(near)}")
