"""The memory that one training step needs, counted on tensors that hold no data."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_train.config.train import TrainConfig
from rwkv_train.models.registry import build_model

_BYTES_PER_PARAMETER = 4 * 4
"""A float32 weight, its gradient and Adam's two moments."""


class MemoryEstimate(NamedTuple):
    """Memory of one device in bytes; the program itself and the allocator's slack come on top."""

    model_bytes: int
    """Weights, gradients and optimizer state."""
    activation_bytes: int
    """What the forward of one micro-batch keeps for its backward, and the gradient of the logits."""

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.model_bytes + self.activation_bytes


def estimate_memory(config: TrainConfig, wkv_backend: str) -> MemoryEstimate:
    """Estimate the memory of one training step on one device.

    The forward runs once on tensors without data; every tensor that autograd keeps is counted once.

    Args:
        config: the settings of the run.
        wkv_backend: name of the recurrence's backend.
    """
    batch, ctx_len = config.trainer.micro_batch_size, config.model.ctx_len
    autocast = (
        torch.autocast("cpu", torch.bfloat16)
        if config.trainer.precision == "bf16-autocast"
        else nullcontext()
    )
    model = build_model(config.model, wkv_backend=wkv_backend, device="meta")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # As if on a CPU: a GPU keeps the same tensors, and need not be there.
    with FakeTensorMode(), torch.device("cpu"):
        model.load_state_dict({name: torch.empty(shape) for name, shape in shapes.items()}, assign=True)
        parameters = {_storage_of(parameter) for parameter in model.parameters()}
        tokens = torch.zeros(batch, ctx_len, dtype=torch.int64)
        kept: dict[Any, int] = {}
        alive = []  # a freed storage's address may be used again

        def count(tensor: Tensor) -> Tensor:
            storage = _storage_of(tensor)
            if storage not in parameters:
                kept[storage] = tensor.untyped_storage().nbytes()
                alive.append(tensor)
            return tensor

        with autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(tokens, targets=tokens)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
    logits_gradient = batch * ctx_len * config.model.vocab_size * 4
    return MemoryEstimate(n_parameters * _BYTES_PER_PARAMETER, sum(kept.values()) + logits_gradient)


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
