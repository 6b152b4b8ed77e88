"""Inputs of a recurrence like those that a model makes, the same for all that are measured."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.benchmarks.kernel_sizes import NO_HEADS, KernelSize
from rwkv_train.ops.context import PLAIN, SequenceContext, packed_context


class KernelInputs(NamedTuple):
    """What a call takes."""

    tensors: tuple[Tensor, ...]
    """In the order of the operator, without the state; each wants a gradient."""
    dy: Tensor
    """A gradient of y."""
    context: SequenceContext
    """Where sequences start."""


def make_inputs(size: KernelSize, device: torch.device, dtype: torch.dtype) -> KernelInputs:
    """Return random inputs of a size, always the same on one kind of device.

    The log decay is float32, all else of ``dtype``.
    """
    generator = torch.Generator(device).manual_seed(0)  # a billion numbers are no work for a GPU

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows = (1, size.B * size.T) if size.packed else (size.B, size.T)
    shape: tuple[int, ...] = (*rows, size.H, size.N)
    if size.op == "wkv7":
        w = -0.6065 * torch.sigmoid(random(*shape))
        key = F.normalize(random(*shape), dim=-1)
        others = [random(*shape), random(*shape), random(*shape), -key, key * torch.sigmoid(random(*shape))]
        inputs = [others[0], w, *others[1:]]
    elif size.op == NO_HEADS:
        shape = (*rows, size.N)
        w = -torch.exp(random(size.N))
        inputs = [w, random(size.N), random(*shape), random(*shape)]
    else:
        by_head = (size.H, size.N)
        w = -torch.exp(random(*(by_head if size.op == "wkv5" else shape)) - 3)
        inputs = [random(*shape), w, random(*shape), random(*shape), random(*by_head)]
    inputs = [x.to(device, torch.float32 if x is w else dtype).requires_grad_() for x in inputs]
    context = packed_context(torch.tensor(size.starts).to(device)) if size.packed else PLAIN
    return KernelInputs(tuple(inputs), random(*shape).to(device, dtype), context)
