"""DeepSpeed's ZeRO: optimizer states (1), gradients (2) and parameters (3) spread over the processes."""

import logging
import os
import warnings
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from rwkv_train.checkpoints.training_state import ParameterState, TrainingCheckpoint
from rwkv_train.config.run import RunConfig
from rwkv_train.errors import ConfigError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.training.engine import MOMENTS, Engine, Skippable, saved_updates
from rwkv_train.training.param_groups import parameter_groups
from rwkv_train.training.zero_adam import make_deepspeed_adam, require_deepspeed_adam
from rwkv_train.training.zero_settings import deepspeed_config, require_that_deepspeed_takes

_MASTERS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 with bfloat16 parameters
)
"""What DeepSpeed's optimizers call their masters, those of this process."""


def make_zero_strategy(config: RunConfig, device: torch.device) -> DeepSpeedStrategy:
    """Build Lightning's strategy, for GPUs or for processes on the CPU.

    Raises:
        ConfigError: DeepSpeed is not installed, its settings contradict ours, or its optimizer does not build here.
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
    settings = deepspeed_config(config, device)
    if config.trainer.deepspeed_config is not None:
        require_that_deepspeed_takes(settings, config.trainer.deepspeed_config)
    if config.optim.implementation == "deepspeed":
        require_deepspeed_adam(on_cpu=_masters_on_cpu(config, device))
    kind = CpuDeepSpeedStrategy if device.type == "cpu" else ScaledOnceStrategy
    strategy = kind(config=settings)
    _leave_out_noise()
    return strategy


def _masters_on_cpu(config: RunConfig, device: torch.device) -> bool:
    return device.type == "cpu" or config.trainer.offload != "none"


def _leave_out_noise() -> None:
    """Keep what DeepSpeed says of itself away from the user, and its warnings away from stdout."""
    # DeepSpeed calls functions of torch under their old names, again and again.
    warnings.filterwarnings("ignore", "`torch\\.distributed\\.\\w+` is deprecated", FutureWarning)
    # Lightning tells the rank, by a logger of its own.
    logging.getLogger("lightning.pytorch.strategies.deepspeed").setLevel(logging.WARNING)
    theirs = logging.getLogger("DeepSpeed")
    theirs.addFilter(_is_news)
    theirs.handlers.clear()  # one for stdout, which is where results go
    theirs.propagate = True


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a warning of DeepSpeed's is none that our choice of the optimizer brings about."""
    return "ZeRO with an untested optimizer" not in record.getMessage()


class ScaledOnceStrategy(DeepSpeedStrategy):
    """DeepSpeed under Lightning, where both divide the loss by the number of accumulated micro-batches."""

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the backward of a loss that Lightning has divided, and keep DeepSpeed from dividing it again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _set_node_environment_variables(self) -> None:
        """Leave the environment alone: the processes have met already, and it would outlast this run."""


class ExactInputPrecision(DeepSpeedPrecision):
    """Parameters in bfloat16 under DeepSpeed, and micro-batches as they are.

    Lightning rounds what is floating in a batch too: here that would be the log-probabilities of a reference, sums over
    whole answers, of which bfloat16 keeps three digits.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_input(self, data: Any) -> Any:
        """Return the batch."""
        return data


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

    def __init__(
        self, model: LanguageModel, config: RunConfig, stored: Collection[str] | None = None
    ) -> None:
        super().__init__(model, config, stored)
        self._exact: dict[str, Tensor] = {}
        if config.trainer.precision == "bf16-params":
            # DeepSpeed makes its masters from parameters that are rounded by then.
            self._exact = {name: p.detach().clone() for name, p in self._named_stored()}

    def shard(self, trainer: Trainer) -> None:
        """Note the device; DeepSpeed spreads the parameters by itself, later."""
        self._device = trainer.strategy.root_device

    def make_optimizer(self) -> Optimizer:
        """Build PyTorch's AdamW or DeepSpeed's, as the settings say."""
        optim = self.config.optim
        if optim.implementation == "torch":
            return super().make_optimizer()
        groups = parameter_groups(self.model, self.config.model.arch, optim, self.config.lr_factors)
        return make_deepspeed_adam(groups, optim, on_cpu=_masters_on_cpu(self.config, self._device))

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

    @property
    def _adam(self) -> Optimizer:
        adam: Optimizer = self._zero.optimizer
        return adam

    def release(self) -> None:
        """Take DeepSpeed's hooks off the parameters: Python does not see that they refer to each other."""
        self._deepspeed.destroy()

    def read(self) -> Iterator[ParameterState]:
        """Gather the masters and moments of the parameters of a checkpoint."""
        import deepspeed  # noqa: PLC0415
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        for name, parameter in self._named_stored():
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
        for part, state in self._zero.optimizer.state.items():
            state["step"] = self._n_steps(saved_updates(saved), part)
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
                "step": self._n_steps(0, part),
                **{moment: torch.zeros_like(part) for moment in MOMENTS},
            }
        if not stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _n_steps(self, n: int, part: Tensor) -> Tensor | int:
        """Return a number of steps as the optimizer keeps it."""
        if self.config.optim.implementation == "deepspeed":
            return n
        return torch.tensor(float(n), device=part.device)

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
