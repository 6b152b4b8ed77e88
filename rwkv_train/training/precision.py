"""What each precision does, the same under every strategy.

``fp32`` computes in float32. ``bf16-autocast`` has float32 parameters and lets autocast choose bfloat16 for the
matrix products. ``bf16-params`` lets the forward see bfloat16 parameters, so that all activations are bfloat16,
while the optimizer updates float32 masters: the published recipe. Under DeepSpeed the masters are its own and
the module's parameters are bfloat16; FSDP2 casts what it gathers; else :func:`cast_in_forward` does.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.start import Start

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16-autocast": torch.bfloat16, "bf16-params": torch.bfloat16}
"""Dtype of the activations under each precision."""


def autocast_of(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context that the forward of a model runs in."""
    if precision == "bf16-autocast":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def as_under_any_strategy(model: LanguageModel, precision: str, device: torch.device) -> Iterator[None]:
    """Let a model that no strategy holds yet compute, without gradient, in the dtypes that it will be trained in.

    Of ``bf16-params`` FSDP and DeepSpeed make something only when they take the model.
    """
    narrow = _cast_parameters(model, torch.bfloat16) if precision == "bf16-params" else nullcontext()
    with narrow, autocast_of(precision, device):
        yield


def prepare_forward(model: LanguageModel, settings: TrainerConfig) -> None:
    """Let the blocks be compiled, blocks and logits recomputed, and parameters be cast, as the settings say."""
    model.recompute_blocks = model.head.recompute_logits = settings.grad_checkpointing
    if settings.compile:
        compile_blocks(model)
    # FSDP and DeepSpeed cast by themselves.
    if settings.precision == "bf16-params" and settings.strategy in {"auto", "ddp"}:
        cast_in_forward(model, torch.bfloat16)


def compile_blocks(model: LanguageModel) -> None:
    """Let each block be compiled when it is first trained."""
    for block in model.blocks:
        # Not block.compile(): hooks and casts around the forward stay outside of what is compiled.
        block.forward = _compiled_in_training(block.forward)


def _compiled_in_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the calls whose gradient is wanted: their shapes are the same in every step.

    Validation and samples have shapes of their own. PyTorch compiles a function for eight of them; what comes later,
    training too, would run as it is.
    """
    compiled = torch.compile(forward, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


def cast_in_forward(model: LanguageModel, dtype: torch.dtype) -> None:
    """Let the model's forward see its parameters in ``dtype``, while they stay what they are.

    The casts are part of the graph, so gradients arrive at the parameters in their own dtype and are
    accumulated in it. Blocks cast by themselves too, because recomputation in the backward calls them alone.
    """
    for module in (model, *model.blocks):
        # Entered before and left after every call; nested calls find nothing left to cast.
        module.forward = _with_cast(module, module.forward, dtype)
    # Texts are also read from states that are asked for outside of the forward.
    model.initial_state = _with_cast(model, model.initial_state, dtype)  # type: ignore[method-assign]
    if model.start is not None:  # nor is it when one is exported
        model.start.forward = _with_cast(model, model.start.forward, dtype)  # type: ignore[method-assign]


def _with_cast(module: nn.Module, function: Callable[..., Any], dtype: torch.dtype) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _cast_parameters(module, dtype):
            return function(*args, **kwargs)

    return run


@contextmanager
def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []  # what holds a parameter, its name there, it
    starts = (part for part in module.modules() if isinstance(part, Start))
    kept = {part for start in starts for part in start.modules()}  # a state is float32 everywhere
    for part in module.modules():
        if part in kept:
            continue
        own: dict[str, Any] = part._parameters
        swapped += [
            (own, name, parameter)
            for name, parameter in own.items()
            if parameter is not None and parameter.dtype != dtype  # a layer without bias has None there
        ]
    try:
        for owner, name, parameter in swapped:
            owner[name] = parameter.to(dtype)
        yield
    finally:
        for owner, name, parameter in swapped:
            owner[name] = parameter
