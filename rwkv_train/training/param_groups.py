"""Which parameter learns how fast and which decays."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rwkv_train.config.optim import OptimConfig
from rwkv_train.models.registry import has_weight_decay, learning_rate_factors


def parameter_groups(
    model: nn.Module, arch: str, optim: OptimConfig, lr_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Sort the parameters of a model into groups for the optimizer.

    Args:
        model: the model; parameter names decide.
        arch: name of the architecture, whose table of learning-rate factors is used.
        optim: learning rate and weight decay.
        lr_factors: further factors by patterns of names, as a shell has them; the last that fits counts.

    Returns:
        Groups with ``params`` and their ``names``, ``lr`` and ``weight_decay`` to start with, and what a schedule
        needs to change these: ``lr_factor``, by which it multiplies its learning rate, and ``has_weight_decay``.
        Together they hold each trained parameter once.
    """
    factors = learning_rate_factors(arch)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = _factor_of(name, factors) * _factor_by_pattern(name, lr_factors or {})
        # Matrices of adapters decay as those of the model do; DoRA's lengths of rows, called a weight, are a vector.
        is_matrix = has_weight_decay(name) or ".miss_block." in name
        decays = is_matrix and ".lora_magnitude_vector." not in name
        group = groups.setdefault(
            (factor, decays),
            {
                "params": [],
                "names": [],
                "lr": optim.lr * factor,
                "weight_decay": optim.weight_decay if decays else 0.0,
                "lr_factor": factor,
                "has_weight_decay": decays,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _factor_of(name: str, factors: Mapping[str, float]) -> float:
    return next((factor for suffix, factor in factors.items() if name.endswith(suffix)), 1.0)


def _factor_by_pattern(name: str, factors: Mapping[str, float]) -> float:
    fitting = [factor for pattern, factor in factors.items() if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else 1.0
