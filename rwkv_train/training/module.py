"""The LightningModule: it joins the model, the loss and the optimizer and does nothing else."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rwkv_train.checkpoints.training_state import TrainingState
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.train import TrainConfig
from rwkv_train.errors import TrainingError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.training.diagnosis import first_bad_tensor
from rwkv_train.training.param_groups import parameter_groups
from rwkv_train.training.schedule import learning_rate_factor

Batch = tuple[Tensor, Tensor]
"""Tokens and the tokens to predict, both ``[B, T]`` int64."""


class PretrainModule(LightningModule):
    """Next-token training of a language model, from step ``start_step`` on.

    Args:
        model: the model, with the weights to start from.
        config: the settings of the run.
        n_steps: optimizer steps of the whole run.
        resume: the state to go on from, whose weights the model already has; ``None`` from scratch.
    """

    def __init__(
        self, model: LanguageModel, config: TrainConfig, n_steps: int, resume: TrainingState | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.n_steps = n_steps
        self.start_step = 0 if resume is None else int(resume.manifest["step"])
        self.loss_sum = torch.zeros(())  # of the micro-batches since the last step, in nats per token
        self.grad_norm = torch.zeros(())
        self._resume = resume
        self._batch: Batch | None = None

    @property
    def completed_steps(self) -> int:
        """Optimizer steps since the very start of the run, over all resumptions."""
        return self.start_step + self.trainer.global_step

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the mean loss of one micro-batch in nats per token."""
        tokens, targets = batch
        self._batch = batch
        losses = self.model(tokens, targets=targets).losses
        loss: Tensor = losses.mean()  # every sample is full, so the mean of means is the mean over tokens
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient to ``optim.grad_clip`` and refuse to step on one that is not finite.

        Raises:
            TrainingError: the norm of the gradient is not finite; the weights are still those of the last step.
        """
        gradients = [grad for parameter in self.model.parameters() if (grad := parameter.grad) is not None]
        self.grad_norm = get_total_norm(gradients)
        # Before clipping, which would spread one NaN over every gradient and so hide where it came from.
        if not torch.isfinite(self.grad_norm):
            assert self._batch is not None
            with self.trainer.precision_plugin.forward_context():
                bad_tensor = first_bad_tensor(self.model, *self._batch)
            raise TrainingError(
                f"step {self.completed_steps + 1}: the gradient is not finite (norm {self.grad_norm:g}); the "
                f"first bad tensor is {bad_tensor}; nothing was saved over the "
                "last checkpoint; start a new run (another trainer.out_dir) with a lower optim.lr or optim.beta2, from "
                "the last checkpoint's weights (model.init_from)"
            )
        if self.config.optim.grad_clip:
            clip_grads_with_norm_(self.model.parameters(), self.config.optim.grad_clip, self.grad_norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW here, not in ``__init__``: by now the strategy has placed the parameters."""
        optim = self.config.optim
        optimizer = make_optimizer(self.model, self.config.model.arch, optim)
        if self._resume is not None:
            restore_moments(optimizer, self._resume)
            self._resume = None  # the moments are in the optimizer now; do not keep them twice
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate_factor(self.start_step + step, self.n_steps, optim)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_optimizer(model: LanguageModel, arch: str, optim: OptimConfig) -> AdamW:
    """Build the optimizer: fused AdamW over the published parameter groups."""
    groups = parameter_groups(model, arch, optim)
    return AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def named_moments(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return Adam's moments by parameter name: ``{"exp_avg": {name: tensor}, "exp_avg_sq": {...}}``.

    A parameter that never had a gradient has moments of zero.
    """
    moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state.get(parameter, {})
            for moment, tensors in moments.items():
                tensors[name] = state[moment] if moment in state else torch.zeros_like(parameter)
    return moments


def restore_moments(optimizer: torch.optim.Optimizer, saved: TrainingState) -> None:
    """Give ``optimizer`` the moments and the step count of a checkpoint."""
    step = float(saved.manifest["step"])
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state: dict[str, Any] = optimizer.state[parameter]
            state["step"] = torch.tensor(step, dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = saved.exp_avg[name].to(parameter)
            state["exp_avg_sq"] = saved.exp_avg_sq[name].to(parameter)
