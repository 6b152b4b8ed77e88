"""Where a loss that is not finite comes from."""

from typing import Any

import torch
from torch import Tensor, nn

from rwkv_train.models.lm import LanguageModel


def first_bad_tensor(model: LanguageModel, tokens: Tensor, targets: Tensor) -> str:
    """Name the first tensor with a value that is not finite: a parameter, else an output, else a gradient.

    Args:
        model: the model, with its gradients; a parameter's own gradient is looked at last.
        tokens: the batch that went wrong, ``[B, T]``.
        targets: the tokens to predict, ``[B, T]``.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    found = _first_bad_output(model, tokens, targets)
    if found is not None:
        return f"the output of {found}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the sum of the squared gradients (each is finite)"


def _first_bad_output(model: LanguageModel, tokens: Tensor, targets: Tensor) -> str | None:
    bad: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(tensor.isfinite().all() for tensor in _tensors(output)):
                bad.append(name or "the model (its losses)")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(tokens, targets=targets)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None  # hooks fire from the inside out, so the innermost comes first


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
