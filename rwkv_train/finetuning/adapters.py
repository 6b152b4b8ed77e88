"""Low-rank adapters beside the linear layers of a model, made by the peft library.

peft puts a layer of its own in the place of a linear one, which is then its ``base_layer``. So names change:
``blocks.0.att.key.weight`` becomes ``blocks.0.att.key.base_layer.weight``, and beside it are
``blocks.0.att.key.lora_A.default.weight`` and the like, the adapter's own parameters.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_train.config.methods import LoraMethod
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.finetuning.targets import Target, find_targets
from rwkv_train.models.lm import LanguageModel

ADAPTER_NAME = "default"
"""What peft calls an adapter where nobody names it; a part of the names of parameters."""

INITIAL_A, INITIAL_B = "pissa_A", "pissa_B"
"""Names of the parameters, within a layer, that hold what PiSSA's matrices were at first: the base is without them."""

_OWN = {"lora_A", "lora_B", "lora_magnitude_vector", "miss_block", INITIAL_A, INITIAL_B}


def is_of_adapter(name: str) -> bool:
    """Tell whether a parameter is the adapter's own, and not the base's.

    Example:
        >>> is_of_adapter("blocks.0.att.key.lora_A.default.weight")
        True
    """
    return not _OWN.isdisjoint(name.split("."))


def base_name(name: str) -> str:
    """Return the official name of a parameter of the base.

    Example:
        >>> base_name("blocks.0.att.key.base_layer.weight")
        'blocks.0.att.key.weight'
    """
    return name.replace(".base_layer.", ".")


def inject_adapter(
    model: LanguageModel, method: LoraMethod, seed: int, initial: Mapping[str, Tensor] | None = None
) -> None:
    """Give a model an adapter, whose parameters are then the only ones that learn.

    The adapter's parameters are float32 where those of the base are narrower. PiSSA takes the part that it starts from
    out of the base's weights; what it took stays in the model as parameters that do not learn, so that a checkpoint of
    the adapter's own parameters and the base's weights give the same model again, bit for bit.

    Args:
        model: with the weights of the base, whole; it is changed. On the device "meta" it has shapes without values.
        method: what kind of adapter, and where.
        seed: of the initial values. PyTorch's global random numbers are neither used nor changed.
        initial: the adapter's own parameters, to go on from; ``None``: it begins.

    Raises:
        ConfigError: peft is not installed; a pattern fits no layer; a rank is too large; the base has a matrix that the
            variant cannot start from.
        CheckpointError: ``initial`` is not what this adapter has.
    """
    targets = find_targets(model, method)
    inject, config = _peft_config(method, targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # what peft draws, it draws on the CPU
        inject(config, model, ADAPTER_NAME)
    if method.dropout > 0:
        model.draws_random_numbers = True
    with torch.no_grad():
        for name, target in targets.items():
            layer: Any = model.get_submodule(name)
            _widen(layer)
            if method.variant == "dora":
                _set_lengths(layer, name)
            if method.variant == "pissa" and initial is None:
                _start_from_singular_values(layer, name, target, target.scale(method))
            elif method.variant == "pissa":
                _register_initial(layer, layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_of_adapter(name) and not _is_initial(name))
        if initial is not None:
            _fill(model, initial)
        if method.variant == "pissa":
            for name, target in targets.items():
                _take_out_of_base(model.get_submodule(name), target.scale(method))


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give out what a model has and its base has not: names and parameters, in the order of the model."""
    return ((name, parameter) for name, parameter in model.named_parameters() if is_of_adapter(name))


def require_peft() -> None:
    """Refuse at once where the library of the adapters is not installed.

    Raises:
        ConfigError: it is not; with the command that installs it.
    """
    # peft loads bitsandbytes, which misses, loudly, a kernel for inference that we do not call.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import peft  # noqa: F401, PLC0415 - takes seconds
    except ImportError as error:
        raise ConfigError(
            f"finetune.method 'lora' needs the package peft ({error}): pip install 'rwkv-train[finetune]'"
        ) from error


def _peft_config(method: LoraMethod, targets: Mapping[str, Target]) -> tuple[Any, Any]:
    """Return peft's function and its settings."""
    require_peft()
    from peft import LoraConfig, MissConfig, inject_adapter_in_model  # noqa: PLC0415

    names = list(targets)
    config: Any
    if method.variant == "miss":
        config = MissConfig(r=method.rank, miss_dropout=method.dropout, target_modules=names)
    else:
        alpha: Any = method.alpha  # it need not be the whole number that peft says
        config = LoraConfig(
            r=method.rank,
            lora_alpha=alpha,
            lora_dropout=method.dropout,
            target_modules=names,
            rank_pattern={name: each.rank for name, each in targets.items() if each.rank != method.rank},
            alpha_pattern={name: each.alpha for name, each in targets.items() if each.alpha != method.alpha},
            use_rslora=method.rslora,
            use_dora=method.variant == "dora",
        )
    return inject_adapter_in_model, config


def _widen(layer: Any) -> None:
    """Keep an adapter's parameters in float32 at least: small steps would be lost in the dtype of a base."""
    for name, parameter in layer.named_parameters():
        if is_of_adapter(name):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _set_lengths(layer: Any, name: str) -> None:
    """Start from the lengths of the rows in the adapter's dtype, not rounded to the base's."""
    magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
    magnitude.copy_(torch.linalg.norm(layer.base_layer.weight.to(magnitude.dtype), dim=1))
    n_zero = 0 if magnitude.is_meta else int((magnitude == 0).sum())
    if n_zero:
        raise ConfigError(
            f"finetune.variant 'dora' divides by the lengths of a matrix's rows, and {n_zero} rows of {name}.weight "
            "are zero; leave the layer out of finetune.targets, or choose another variant"
        )


def _start_from_singular_values(layer: Any, name: str, target: Target, scale: float) -> None:
    """Begin with the largest singular values of the base's weight, as in Meng et al. 2024, "PiSSA", arXiv:2404.02948.

    With ``W = U S V^T`` and the ``r`` largest of ``S``, ``B = U_r sqrt(S_r / s)`` and ``A = sqrt(S_r / s) V_r^T``. Not
    by peft: that would leave the base without them as it rounds, and what it took must be taken again at a resume.
    """
    weight = layer.base_layer.weight.double()
    is_wide = target.n_outputs <= target.n_inputs
    # Eigenvectors of the smaller product come several times sooner than all singular vectors, and in float64 the
    # largest are more exact than those of a decomposition in float32.
    squares, vectors = torch.linalg.eigh(weight @ weight.T if is_wide else weight.T @ weight)
    if not squares.is_meta and squares[-1] <= 0:
        raise ConfigError(
            f"finetune.variant 'pissa' starts from singular values, and those of {name}.weight are all zero; leave the "
            "layer out of finetune.targets, or choose another variant"
        )
    smallest = squares[-1] * torch.finfo(squares.dtype).eps  # what is below is 0, but for rounding
    values, vectors = squares[-target.rank :].clamp(min=smallest).sqrt(), vectors[:, -target.rank :]
    # One side's vectors are found; those of the other side are V = W^T U / S, or U = W V / S.
    ours, for_others = vectors * (values / scale).sqrt(), vectors / (values * scale).sqrt()
    a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    a.copy_(for_others.T @ weight if is_wide else ours.T)
    b.copy_(ours if is_wide else weight @ for_others)
    _register_initial(layer, a, b)


def _register_initial(layer: Any, a: Tensor, b: Tensor) -> None:
    for name, value in ((INITIAL_A, a), (INITIAL_B, b)):
        layer.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))


def _is_initial(name: str) -> bool:
    return name.endswith((f".{INITIAL_A}", f".{INITIAL_B}"))


def _take_out_of_base(layer: Any, scale: float) -> None:
    """Leave the residual ``W - s B0 A0``, computed in float64 so that it is the same number however it is summed."""
    weight = layer.base_layer.weight
    initial_a, initial_b = getattr(layer, INITIAL_A), getattr(layer, INITIAL_B)
    weight.copy_(torch.addmm(weight.double(), initial_b.double(), initial_a.double(), alpha=-scale))


def _fill(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    own = dict(own_parameters(model))
    if wrong := sorted(own.keys() ^ initial.keys()):
        there = "lacks" if wrong[0] in own else "has"
        raise CheckpointError(
            f"the adapter of the checkpoint is not that of finetune: it {there} '{wrong[0]}'; go on with the settings "
            "it was saved with"
        )
    for name, parameter in own.items():
        if initial[name].shape != parameter.shape:
            raise CheckpointError(
                f"the adapter of the checkpoint is not that of finetune: '{name}' has shape "
                f"{list(initial[name].shape)}, wanted {list(parameter.shape)}; go on with the settings "
                "it was saved with"
            )
        parameter.copy_(initial[name])
