"""Which backends the tests of the operators run: those that take CPU tensors."""

import torch

from rwkv_train.ops.backends import Problem
from rwkv_train.ops.prepare import OPERATORS


def backends_on_cpu(op):
    problem = Problem("cpu", torch.float32, 8)
    return [name for name, backend in OPERATORS[op].items() if backend.refuses(problem) is None]
