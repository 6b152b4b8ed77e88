"""Which of a model's own parameters learn."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from rwkv_train.config.methods import FreezeMethod
from rwkv_train.errors import ConfigError
from rwkv_train.models.lm import LanguageModel


def freeze(model: LanguageModel, method: FreezeMethod) -> None:
    """Let only the parameters that the settings name learn.

    Raises:
        ConfigError: a pattern fits no parameter, there are not so many layers, or nothing is left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    require_matches("finetune.train", method.train, names)
    n_layer = model.config.n_layer
    if method.frozen_layers > n_layer:
        raise ConfigError(
            f"finetune.frozen_layers is {method.frozen_layers} but the model has {n_layer} layers; it must be at "
            "most that"
        )
    frozen = tuple(f"blocks.{layer}." for layer in range(method.frozen_layers))
    if frozen:
        frozen += ("emb.",)
    for name, parameter in model.named_parameters():
        learns = any(fnmatchcase(name, pattern) for pattern in method.train) and not name.startswith(frozen)
        parameter.requires_grad_(parameter.requires_grad and learns)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"finetune.train {method.train} leaves nothing to learn above frozen_layers ({method.frozen_layers}); name "
            "other parameters, or freeze fewer layers"
        )


def require_learning(setting: str, factors: Mapping[str, float], model: nn.Module) -> None:
    """Refuse a pattern that fits no parameter which learns.

    Raises:
        ConfigError: there is one.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    require_matches(setting, list(factors), names)


def require_matches(setting: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a pattern that fits none of the names.

    Raises:
        ConfigError: there is one.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1, cutoff=0.3) or list(names[:1])
            raise ConfigError(
                f"{setting} has {pattern!r}, which fits no name; there is, for instance, {near[0]!r}"
            )
