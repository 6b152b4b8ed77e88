"""DeepSpeed's ZeRO: optimizer states (1), gradients (2) and parameters (3) spread over the processes."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from rwkv_train.checkpoints.training_state import ParameterState, TrainingCheckpoint
from rwkv_train.config.train import TrainConfig
from rwkv_train.errors import ConfigError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.training.engine import MOMENTS, Engine, Skippable

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
    "zero_optimization.stage": "trainer.strategy",
    "zero_optimization.offload_optimizer.device": "trainer.offload",
    "zero_optimization.offload_param.device": "trainer.offload",
}
"""What a user's DeepSpeed file must not hold -> the setting of ours that decides it."""


_MASTERS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 with bfloat16 parameters
)
"""What DeepSpeed's optimizers call their masters, those of this process."""


def deepspeed_config(config: TrainConfig, device: torch.device) -> Json:
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
        ConfigError: it names the setting of ours to use instead.
    """
    for name, setting in _OURS.items():
        if _holds(theirs, name.split(".")):
            raise ConfigError(f"{source}: {name} is decided by {setting}; set that, and leave it out there")
    return _merged(ours, theirs)


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Json:
    result = dict(ours)
    for key, value in theirs.items():
        before = result.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(cast(Json, before), value) if both else value
    return result


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


def make_zero_strategy(config: TrainConfig, device: torch.device) -> DeepSpeedStrategy:
    """Build Lightning's strategy, for GPUs or for processes on the CPU.

    Raises:
        ConfigError: DeepSpeed is not installed, or its settings contradict ours.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    try:
        import deepspeed  # noqa: F401, PLC0415 - seconds that only its users pay
    except ImportError as error:
        raise ConfigError(
            f"trainer.strategy {config.trainer.strategy!r} needs DeepSpeed, which cannot be imported ({error}); "
            "pip install deepspeed, or choose 'ddp' or 'fsdp2'"
        ) from error
    kind = CpuDeepSpeedStrategy if device.type == "cpu" else ScaledOnceStrategy
    return kind(config=deepspeed_config(config, device))


class ScaledOnceStrategy(DeepSpeedStrategy):
    """DeepSpeed under Lightning, where both divide the loss by the number of accumulated micro-batches."""

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the backward of a loss that Lightning has divided, and keep DeepSpeed from dividing it again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _set_node_environment_variables(self) -> None:
        """Leave the environment alone: the processes have met already, and it would outlast this run."""


class CpuDeepSpeedStrategy(ScaledOnceStrategy):
    """DeepSpeed on processes of the CPU, which Lightning's own strategy refuses."""

    @property
    def root_device(self) -> torch.device:
        """The CPU, with the index that DeepSpeed asks every device for."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """Skip the gate that lets only CUDA through."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the processes, without the shared-memory collectives that DeepSpeed would compile for a minute."""
        import deepspeed  # noqa: PLC0415

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class ZeroEngine(Engine):
    """DeepSpeed clips, steps and holds the float32 masters; its getters and setters reach them."""

    def __init__(self, model: LanguageModel, config: TrainConfig) -> None:
        super().__init__(model, config)
        self._exact: dict[str, Tensor] = {}
        if config.trainer.precision == "bf16-params":
            # DeepSpeed makes its masters from parameters that are rounded by then.
            self._exact = {name: p.detach().clone() for name, p in model.named_parameters()}

    def bind(self, trainer: Trainer) -> None:
        """Find DeepSpeed's parts; give the masters their unrounded values."""
        super().bind(trainer)
        self._deepspeed = cast(Any, trainer.model)
        self._zero = self._deepspeed.optimizer
        # DeepSpeed finds moments only where every group has them when it first looks, which is after one group's step.
        self._make_states()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name in self._exact:
                self._set(parameter, self._exact.pop(name), None)
        # What is left has no master: parameters that are not trained.

    def clip(self) -> Tensor | None:
        """Do nothing: DeepSpeed clips within its step."""
        return None

    def step_norm(self) -> Tensor | None:
        """Return the norm of the step just taken; one that was not finite made DeepSpeed leave the step out."""
        norm = self._deepspeed.get_global_grad_norm()
        if self._zero.overflow:
            norm = float("nan")
        return torch.as_tensor(norm, dtype=torch.float32)

    def skip_step(self, skip: bool) -> None:
        """Let the optimizer that DeepSpeed wraps leave its next step out, or not."""
        assert isinstance(self._zero.optimizer, Skippable)
        self._zero.optimizer.skip_next = skip

    def read(self) -> Iterator[ParameterState]:
        """Gather every parameter's master and moments."""
        import deepspeed  # noqa: PLC0415
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        for name, parameter in self.model.named_parameters():
            if name in self._exact:
                yield ParameterState(name, self._exact[name], None, None)
                continue
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    weight = parameter.detach().float().clone()
                yield ParameterState(name, weight, None, None)
                continue
            moments = [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
            yield ParameterState(name, safe_get_full_fp32_param(parameter), *moments)

    def restore(self, saved: TrainingCheckpoint) -> None:
        """Give DeepSpeed the masters, moments and number of steps of a checkpoint."""
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(float(saved.manifest["step"]))
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            stored = saved.parameter(name)
            self._set(parameter, stored.weight, None)
            for moment, value in zip(MOMENTS, (stored.exp_avg, stored.exp_avg_sq), strict=True):
                assert value is not None, name
                self._set(parameter, value, moment)

    def _make_states(self) -> None:
        """Create the moments and the number of steps, which Adam would make in its first step."""
        optimizer: Optimizer = self._zero.optimizer
        stage_3 = hasattr(self._zero, "fp32_partitioned_groups_flat")
        parts: list[Tensor] = next(
            getattr(self._zero, name) for name in _MASTERS if hasattr(self._zero, name)
        )
        for part in parts:
            optimizer.state[part] = {
                "step": torch.tensor(0.0, device=part.device),
                **{moment: torch.zeros_like(part) for moment in MOMENTS},
            }
        if not stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        """Set the master (``moment`` None) or a moment from a whole tensor."""
        from deepspeed import utils  # noqa: PLC0415

        value = value.to(torch.float32)
        if hasattr(parameter, "ds_id"):  # stage 3
            # DeepSpeed's setter of whole values fails where the last process holds padding.
            length = parameter.ds_tensor.numel()
            start = torch.distributed.get_rank() * length
            own = torch.zeros(length)
            given = value.flatten()[start : start + length]
            own[: given.numel()] = given
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
