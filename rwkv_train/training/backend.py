"""The backend of the recurrence for a run, chosen and loaded before the first step."""

import torch

from rwkv_train.config.train import TrainConfig
from rwkv_train.errors import BackendError
from rwkv_train.models.registry import recurrence_of
from rwkv_train.ops.backends import Problem, ResolvedBackend, capability_of
from rwkv_train.ops.prepare import prepare_backend
from rwkv_train.training.precision import COMPUTE_DTYPES


def choose_wkv_backend(config: TrainConfig, device: torch.device) -> ResolvedBackend:
    """Return the name of the backend to run and why.

    Raises:
        BackendError: ``trainer.wkv_backend`` names one that cannot run here.
    """
    op, head_size = recurrence_of(config.model)
    problem = Problem(
        device.type,
        COMPUTE_DTYPES[config.trainer.precision],
        head_size,
        is_packed=config.data.documents == "reset",
        capability=capability_of(device),
    )
    try:
        return prepare_backend(op, problem, config.trainer.wkv_backend)
    except BackendError as error:
        raise BackendError(f"trainer.wkv_backend: {error}") from error
