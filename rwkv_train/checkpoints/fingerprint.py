"""A short name for the numbers in a set of weights, whatever file holds them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_train.checkpoints.tensors import as_bytes
from rwkv_train.models.registry import ARCHITECTURES

N_RUNS = 64
"""Runs of neighbouring values that are read of a large tensor. Single values, as evenly spread as these, would lie on
every page of its file, so that all of it had to be read."""

RUN_LENGTH = 1024
"""Values in a run."""

SHORT = 12
"""Characters of a fingerprint in a message."""

_UNUSED = frozenset[str]().union(*(each.unused_parameters for each in ARCHITECTURES.values()))


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a name for a model's weights that is the same in every format, and in every dtype that holds them.

    It is the SHA-256 of names, shapes and values in float32, in the order of the names. Of a tensor of more than
    65,536 values it takes 64 runs of 1024, evenly spaced from the first value to the last. Parameters that the model
    does not use, which a file may lack, are passed over.

    Args:
        weights: official name -> tensor, on any device; may be mapped from the disk.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    for name in sorted(weights.keys() - _UNUSED):
        tensor = weights[name]
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(as_bytes(_sample(tensor.detach()).to("cpu", torch.float32)))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    values = tensor.reshape(-1)
    n_values = values.numel()
    if n_values <= N_RUNS * RUN_LENGTH:
        return values
    starts = [(n_values - RUN_LENGTH) * run // (N_RUNS - 1) for run in range(N_RUNS)]
    return torch.cat([values[start : start + RUN_LENGTH] for start in starts])
