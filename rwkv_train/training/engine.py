"""Where parameters, gradients and moments lie: all that the strategies do differently around an optimizer step."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from rwkv_train.checkpoints.training_state import ParameterState, TrainingCheckpoint
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.run import RunConfig
from rwkv_train.models.lm import LanguageModel
from rwkv_train.training.param_groups import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's names of its moments."""


class Skippable:
    """Mixed into an optimizer: can leave a step out, so that neither weights nor moments change."""

    skip_next = False

    def step(self, closure: Any = None) -> Any:
        """Evaluate ``closure``, which computes the gradients and may set ``skip_next``; then update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.skip_next:
            super().step()  # type: ignore[misc]
        return loss


class SkippableAdamW(Skippable, AdamW):
    """PyTorch's AdamW."""


def make_optimizer(
    model: nn.Module, arch: str, optim: OptimConfig, lr_factors: Mapping[str, float] | None = None
) -> Optimizer:
    """Build the optimizer: fused AdamW over the parameter groups of :func:`parameter_groups`."""
    groups = parameter_groups(model, arch, optim, lr_factors)
    return SkippableAdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def saved_updates(saved: TrainingCheckpoint) -> int:
    """Return how many updates Adam had made: one a step, but for steps that were left out."""
    manifest = saved.manifest
    return int(manifest["updates"] if "updates" in manifest else manifest["step"])


class Engine:
    """One process, or DDP: every process holds every parameter. Other strategies override what they change.

    All processes make the same calls in the same order.

    Args:
        model: the model, still whole and on the CPU, with the weights to start from.
        config: the settings of the run.
        stored: names of the parameters that a checkpoint holds; ``None``: all.
    """

    optimizer: Optimizer

    def __init__(
        self, model: LanguageModel, config: RunConfig, stored: Collection[str] | None = None
    ) -> None:
        self.model = model
        self.config = config
        self._stored = stored

    def shard(self, trainer: Trainer) -> None:
        """Spread the parameters over the processes, where the strategy leaves that to us."""

    def make_optimizer(self) -> Optimizer:
        """Build the optimizer; its parameters are where the strategy has put them."""
        return make_optimizer(self.model, self.config.model.arch, self.config.optim, self.config.lr_factors)

    def bind(self, trainer: Trainer) -> None:
        """Take note of what the strategy has made of model and optimizer; training starts next."""
        self.optimizer = trainer.optimizers[0]

    def clip(self) -> Tensor | None:
        """Scale the gradients to a norm of ``optim.grad_clip``, unless it is 0 or the norm is not finite.

        Returns:
            The norm over all parameters before, a scalar; ``None`` where the step itself finds it.
        """
        parameters = list(self.model.parameters())
        norm = self.full(get_total_norm([grad for p in parameters if (grad := p.grad) is not None]))
        # Scaling by a norm that is not finite would spread one NaN over every gradient and hide its origin.
        if self.config.optim.grad_clip and torch.isfinite(norm):
            clip_grads_with_norm_(parameters, self.config.optim.grad_clip, norm)
        return norm

    def step_norm(self) -> Tensor | None:
        """Return the norm that the step just taken has found, where :meth:`clip` returned none.

        A step whose norm is not finite was not applied.
        """
        return None

    def skip_step(self, skip: bool) -> None:
        """Let the optimizer leave its next step out, or not."""
        assert isinstance(self.optimizer, Skippable)
        self.optimizer.skip_next = skip

    def rest(self) -> None:
        """Bring the parameters back to how they lie between steps, after calls of the model without a backward."""

    def release(self) -> None:
        """Let go of what would keep the model in memory after the run, in a process that goes on."""

    def read(self) -> Iterator[ParameterState]:
        """Go through the parameters of a checkpoint, each in full; every process has to go through all of them."""
        for name, parameter in self._named_stored():
            weight = self.full(parameter.detach())
            if parameter.requires_grad:
                yield ParameterState(name, weight, *(self._moment(parameter, moment) for moment in MOMENTS))
            else:
                yield ParameterState(name, weight, None, None)

    def _named_stored(self) -> Iterator[tuple[str, nn.Parameter]]:
        stored = self._stored
        return (pair for pair in self.model.named_parameters() if stored is None or pair[0] in stored)

    def restore(self, saved: TrainingCheckpoint) -> None:
        """Give the optimizer the moments and the number of steps of a checkpoint; the model has its weights."""
        step = float(saved_updates(saved))
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            stored = saved.parameter(name)
            state = self.optimizer.state[parameter]
            state["step"] = torch.tensor(step, dtype=torch.float32, device=parameter.device)
            for moment, value in zip(MOMENTS, (stored.exp_avg, stored.exp_avg_sq), strict=True):
                assert value is not None, name
                state[moment] = self.place(value, parameter)

    @property
    def n_updates(self) -> int:
        """Updates that Adam has made since the start of the run, by which it corrects its moments."""
        states = self._adam.state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    @property
    def _adam(self) -> Optimizer:
        return self.optimizer

    def full(self, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor that may be spread over the processes."""
        return tensor

    def place(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return a whole tensor as the strategy holds ``parameter``."""
        return value.to(parameter)

    def _moment(self, parameter: Tensor, moment: str) -> Tensor:
        state = self.optimizer.state.get(parameter, {})
        if moment not in state:  # it never had a gradient
            return torch.zeros(parameter.shape, device=parameter.device)
        return self.full(state[moment])
