"""The backend of the recurrence for a run, chosen and loaded before the first step."""

import torch

from rwkv_train.config.run import RunConfig
from rwkv_train.errors import BackendError
from rwkv_train.models.registry import recurrence_of
from rwkv_train.ops.backends import Problem, ResolvedBackend
from rwkv_train.ops.chip import capability_of, chip_name
from rwkv_train.ops.crossover import power_of_two_near
from rwkv_train.ops.prepare import prepare_backend
from rwkv_train.training.precision import COMPUTE_DTYPES


def choose_wkv_backend(config: RunConfig, device: torch.device) -> ResolvedBackend:
    """Return the name of the backend to run and why.

    Speeds count at the sizes of a micro-batch, with a backward pass; where samples are packed (documents begin with a
    fresh state each, of lengths that are not known yet), as if each were one document.

    Raises:
        BackendError: ``trainer.wkv_backend`` names one that cannot run here.
    """
    op, head_size = recurrence_of(config.model)
    width = config.model.n_embd // (head_size or 1)  # heads, or channels where there are none
    problem = Problem(
        device.type,
        COMPUTE_DTYPES[config.trainer.precision],
        head_size,
        is_packed=config.is_packed,
        capability=capability_of(device),
        chip=chip_name(device),
        n_recurrences=power_of_two_near(config.trainer.micro_batch_size * width),
        n_tokens=power_of_two_near(config.model.ctx_len),
        needs_backward=True,
    )
    try:
        return prepare_backend(op, problem, config.trainer.wkv_backend)
    except BackendError as error:
        raise BackendError(f"trainer.wkv_backend: {error}") from error
