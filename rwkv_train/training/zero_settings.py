"""DeepSpeed's own settings: ours, with a user's JSON file merged over them."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from rwkv_train.config.run import RunConfig
from rwkv_train.errors import ConfigError

Json = dict[str, Any]

_OURS = {
    "optimizer": "the section optim",
    "scheduler": "the section optim",
    "gradient_clipping": "optim.grad_clip",
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_accumulation_steps": "trainer.global_batch_size",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "data_types": "trainer.precision",
    "communication_data_type": "trainer.precision",
    "gradient_accumulation_dtype": "trainer.precision",
    "gradient_predivide_factor": "trainer.global_batch_size",
    "tensor_parallel": "trainer.strategy",
    "zero_allow_untested_optimizer": "optim.implementation",
    "zero_force_ds_cpu_optimizer": "optim.implementation",
    "zero_optimization.stage": "trainer.strategy",
    "zero_optimization.compute_grad_norm": "the section guard",  # which judges each step by its norm
    "zero_optimization.offload_optimizer.device": "trainer.offload",
    "zero_optimization.offload_param.device": "trainer.offload",
    "zero_optimization.cpu_offload": "trainer.offload",
    "zero_optimization.cpu_offload_param": "trainer.offload",
}
"""What a user's DeepSpeed file must not hold -> the setting of ours that decides it."""


def deepspeed_config(config: RunConfig, device: torch.device) -> Json:
    """Return DeepSpeed's settings for a run: ours, with the user's own file merged over them.

    Args:
        config: the settings of the run.
        device: kind of device.

    Raises:
        ConfigError: the file cannot be read, or holds what our settings decide.
    """
    settings = config.trainer
    zero: Json = {"stage": settings.zero_stage}
    pin_memory = device.type == "cuda"
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if settings.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    ours: Json = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero,
        # Ours is PyTorch's AdamW, also where the states are offloaded.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",  # gradients are summed in float32 in every precision
    }
    if settings.precision == "bf16-params":
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if settings.deepspeed_config is None:
        return ours
    path = Path(settings.deepspeed_config).expanduser()
    return merge_deepspeed_config(ours, _read(path), str(path))


def merge_deepspeed_config(ours: Mapping[str, Any], theirs: Mapping[str, Any], source: str) -> Json:
    """Lay a user's DeepSpeed settings over ours.

    Args:
        ours: nested settings.
        theirs: nested settings; none of them may be what a setting of ours decides.
        source: where ``theirs`` come from, for the message.

    Raises:
        ConfigError: it names the setting of ours to use instead, or what must be an object.
    """
    for name, setting in _OURS.items():
        if _holds(theirs, name.split(".")):
            raise ConfigError(f"{source}: {name} is decided by {setting}; set that, and leave it out there")
    return _merged(ours, theirs, f"{source}: ")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> Json:
    result = dict(ours)
    for key, value in theirs.items():
        before = result.get(key)
        if not isinstance(before, Mapping):
            result[key] = value
        elif isinstance(value, Mapping):
            result[key] = _merged(cast(Json, before), value, f"{where}{key}.")
        else:  # would take away what our settings decide in it
            raise ConfigError(
                f"{where}{key} is {json.dumps(value)} but must be an object; write one, or leave it out"
            )
    return result


def require_that_deepspeed_takes(settings: Json, source: str) -> None:
    """Let DeepSpeed read its settings now: later, its refusals are no sentences.

    Args:
        settings: all of them.
        source: the user's file, for the message.

    Raises:
        ConfigError: it refuses them.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError  # noqa: PLC0415

    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"{source}: DeepSpeed refuses {_reason(error)}; correct it there, or leave it out"
        ) from error


def _reason(error: Exception) -> str:
    """What an error says in one line; pydantic's lists every problem with its place."""
    problems = getattr(error, "errors", None)
    if problems is None:
        return f"it: {str(error).rstrip('. ')}"
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems())


def _holds(tree: Any, path: list[str]) -> bool:
    if not path:
        return True
    return isinstance(tree, Mapping) and path[0] in tree and _holds(tree[path[0]], path[1:])


def _read(path: Path) -> Json:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"trainer.deepspeed_config ({path}) cannot be read: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"trainer.deepspeed_config ({path}) is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"trainer.deepspeed_config ({path}) holds a {type(content).__name__}, not an object"
        )
    return content
