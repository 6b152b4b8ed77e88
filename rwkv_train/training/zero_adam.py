"""DeepSpeed's own Adam: one for GPUs, one for states in the CPU's memory; compiled where they are first used."""

import subprocess
from typing import Any

import torch
from torch.optim import Optimizer

from rwkv_train.config.optim import OptimConfig
from rwkv_train.errors import ConfigError
from rwkv_train.training.engine import Skippable


def require_deepspeed_adam(*, on_cpu: bool) -> None:
    """Compile DeepSpeed's Adam, which takes about a minute the first time, or load what was compiled before.

    Args:
        on_cpu: whether its states lie in the CPU's memory.

    Raises:
        ConfigError: it does not build here.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder  # noqa: PLC0415
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException  # noqa: PLC0415

    builder = CPUAdamBuilder() if on_cpu else FusedAdamBuilder()
    try:
        builder.load(verbose=False)
    except (
        RuntimeError,
        OSError,
        ImportError,
        subprocess.SubprocessError,
        CUDAMismatchException,
        MissingCUDAException,
    ) as error:
        needs = "a C++ compiler" if on_cpu else "the CUDA toolkit of PyTorch's version and a C++ compiler"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"optim.implementation is 'deepspeed' but its operator {builder.name} does not build here ({reason}); "
            f"install {needs} and ninja, or set optim.implementation to 'torch'"
        ) from error


class _WithoutPast:
    """Mixed into DeepSpeedCPUAdam: the powers of the betas in its bias correction come from the step's number alone.

    The compiled part multiplies those of the step before, if that is the one it made last, and computes them anew
    otherwise; so a resumed run would differ in the last digit.
    """

    def step(self: Any, closure: Any = None) -> Any:
        """Make the compiled part forget its last step by one of another number, of a tensor of one element."""
        far = max((state["step"] for state in self.state.values()), default=0) + 2
        group = self.param_groups[0]
        settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], True)
        weight, gradient, exp_avg, exp_avg_sq = torch.zeros(4, 1)
        self.ds_opt_adam.adam_update(self.opt_id, far, *settings, weight, gradient, exp_avg, exp_avg_sq)
        return super().step(closure)  # type: ignore[misc]


def make_deepspeed_adam(groups: list[dict[str, Any]], optim: OptimConfig, *, on_cpu: bool) -> Optimizer:
    """Build DeepSpeed's Adam with decoupled weight decay.

    Its state differs from that of PyTorch's in one thing: ``step`` is an int.

    Args:
        groups: the parameter groups.
        optim: what they have in common.
        on_cpu: whether its states lie in the CPU's memory.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam  # noqa: PLC0415

    parts = (Skippable, _WithoutPast, DeepSpeedCPUAdam) if on_cpu else (Skippable, FusedAdam)
    kind: Any = type("SkippableAdam", parts, {})
    mode = {"adamw_mode": True} if on_cpu else {"adam_w_mode": True}
    adam: Optimizer = kind(
        groups, bias_correction=True, betas=(optim.beta1, optim.beta2), eps=optim.eps, **mode
    )
    return adam
