"""Where a loss or gradient that is not finite comes from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_train.data.module import MicroBatch
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.objective import context_of


def where_it_went_wrong(module: TrainingModule, processes: Processes) -> str:
    """Name the first bad tensor of the step just taken, on the first process that has one.

    All processes call this together; its forward is one more for each of them.
    """
    assert module.last_batch is not None
    with module.forward_context():
        found = first_bad_tensor(module.model, module.last_batch, module.engine.full, module.engine.rest)
    for rank, name in enumerate(processes.gather(found)):
        if name is not None:
            where = f" (on rank {rank})" if processes.world_size > 1 else ""
            return f"the first bad tensor is {name}{where}"
    return "the parameters and outputs of the model are finite"


def first_bad_tensor(
    model: LanguageModel,
    batch: MicroBatch,
    full: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    rest: Callable[[], None] = lambda: None,
) -> str | None:
    """Name the first tensor with a value that is not finite: a parameter, else an output, else a gradient.

    Args:
        model: the model, with its gradients where the strategy keeps them; they are looked at last.
        batch: the batch that went wrong.
        full: gathers a parameter or gradient that is spread over processes.
        rest: called after the forward, which has no backward.
    """
    for name, parameter in model.named_parameters():
        if not full(parameter.detach()).isfinite().all():
            return f"the parameter {name}"
    found = _first_bad_output(model, batch)
    rest()
    if found is not None:
        return f"the output of {found}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not full(parameter.grad).isfinite().all():
            return f"the gradient of {name}"
    return None


def _first_bad_output(model: LanguageModel, batch: MicroBatch) -> str | None:
    bad: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(tensor.isfinite().all() for tensor in _tensors(output)):
                bad.append(name or "the model (its losses)")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(batch.tokens, targets=batch.targets, context=context_of(batch))
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
