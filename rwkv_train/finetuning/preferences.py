"""Losses that prefer one of two answers: DPO, ORPO and SimPO, as functions of their log-probabilities.

All are computed in float32, or in float64 where they are given so, and nothing waits for the device. Means over pairs
are left to the caller: the pairs of one step may stand in several rows and on several processes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rwkv_train.config.preference import PreferenceConfig

_NEAREST_TO_ZERO = -torch.finfo(torch.float32).eps
"""The largest mean log-probability that odds are taken of: those of a probability of 1 are infinite."""


class PairValues(NamedTuple):
    """One number for each answer of P pairs."""

    chosen: Tensor
    """``[P]``."""
    rejected: Tensor
    """``[P]``."""


class PreferenceLoss(NamedTuple):
    """What a loss says of P pairs."""

    losses: Tensor
    """``[P]`` in float32, differentiable."""
    chosen_rewards: Tensor
    """``[P]``, without gradient: how much the model favours the chosen answer, in the units of the loss."""
    rejected_rewards: Tensor
    """``[P]``, without gradient."""

    @property
    def margins(self) -> Tensor:
        """Reward of the chosen answer less that of the rejected one, ``[P]``."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """1 where the chosen answer has the larger reward, else 0, ``[P]``; equal rewards count 0."""
        return (self.margins > 0).to(self.margins.dtype)


def sequence_log_probs(
    losses: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each sequence, summed over its targets, and how many targets it has.

    Each sum is taken over the whole row with the others masked out, which needs ``S T`` numbers for a moment. Added by
    index on a GPU, the losses of a sequence would come in another order each time.

    Args:
        losses: of each target in nats, ``[B, T]``.
        targets: ids, or ``ignore_index`` where nothing is predicted, ``[B, T]`` int64.
        cu_seqlens: where the sequences of the one row (B = 1) start, ``[S + 1]`` int64 from 0 to T; ``None``: each row
            is one sequence (S = B).
        ignore_index: stands for no target; its loss is left out, whatever it is.

    Returns:
        ``(sums, counts)``: ``[S]`` both, sums in float32 (float64 where the losses are), differentiable; counts int64.

    Raises:
        ValueError: the shapes disagree.
    """
    if losses.dim() != 2 or losses.shape != targets.shape:
        raise ValueError(
            f"losses and targets must be [B, T], got {tuple(losses.shape)} and {tuple(targets.shape)}"
        )
    is_counted = targets != ignore_index
    losses = _wide(losses)
    if cu_seqlens is not None:
        if losses.shape[0] != 1:
            raise ValueError(f"a row with cu_seqlens must be alone, got {losses.shape[0]} rows")
        positions = torch.arange(losses.shape[1], device=losses.device)
        is_inside = (positions >= cu_seqlens[:-1, None]) & (positions < cu_seqlens[1:, None])  # [S, T]
        is_counted = is_counted & is_inside
    return -losses.where(is_counted, losses.new_zeros(())).sum(dim=1), is_counted.sum(dim=1)


def dpo_loss(
    log_probs: PairValues, reference: PairValues, *, beta: float, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """Return the loss that raises the chosen answer over the rejected one, both against a fixed reference.

    With the reward ``r = beta (log p - log p_reference)`` of an answer and the margin ``m = r_chosen - r_rejected``::

        loss = -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m)

    Args:
        log_probs: summed over the answer's tokens.
        reference: likewise, of the model before the run.
        beta: steepness.
        label_smoothing: part of the pairs that are taken to be the wrong way round, below 0.5.

    Source:
        Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, equation 7; Mitchell 2023, "A note on
        DPO with noisy preferences and relationship to IPO" (label smoothing).
    """
    chosen = beta * (_wide(log_probs.chosen) - _wide(reference.chosen))
    rejected = beta * (_wide(log_probs.rejected) - _wide(reference.rejected))
    margins = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return PreferenceLoss(losses, chosen.detach(), rejected.detach())


def orpo_loss(mean_log_probs: PairValues, *, beta: float) -> PreferenceLoss:
    """Return the chosen answer's own loss and, beside it, a loss on the odds of both; there is no reference.

    With the mean log-probability ``x`` of an answer's tokens::

        log_odds(x) = x - log(1 - exp(x))
        loss = -x_chosen - beta log sigmoid(log_odds(x_chosen) - log_odds(x_rejected))

    The odds of a probability of 1 are infinite: above ``-2^-23`` the odds stay where they are, without gradient.

    Args:
        mean_log_probs: mean over the answer's tokens.
        beta: weight of the second term (lambda in the paper).

    Returns:
        The losses; rewards are ``beta x``.

    Source:
        Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691,
        equations 6 and 7.
    """
    chosen, rejected = map(_wide, mean_log_probs)
    losses = -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def simpo_loss(mean_log_probs: PairValues, *, beta: float, gamma: float) -> PreferenceLoss:
    """Return the loss that raises the chosen answer over the rejected one by a margin; there is no reference.

    With the reward ``r = beta x`` of an answer, of whose tokens ``x`` is the mean log-probability::

        loss = -log sigmoid(r_chosen - r_rejected - gamma)

    Args:
        mean_log_probs: mean over the answer's tokens.
        beta: steepness.
        gamma: margin of the rewards.

    Source:
        Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734,
        equation 6.
    """
    chosen, rejected = (beta * _wide(x) for x in mean_log_probs)
    return PreferenceLoss(-logsigmoid(chosen - rejected - gamma), chosen.detach(), rejected.detach())


def preference_loss(
    config: PreferenceConfig, log_probs: PairValues, n_tokens: PairValues, reference: PairValues | None = None
) -> PreferenceLoss:
    """Return the loss of each pair that the settings ask for.

    Args:
        config: which loss.
        log_probs: summed over the answer's tokens, as :func:`sequence_log_probs` gives them.
        n_tokens: how many these are, at least 1.
        reference: ``log_probs`` of the model before the run; only for DPO, which needs them.

    Raises:
        ValueError: the reference is missing, or is given to a loss that has none.
    """
    if (reference is not None) != (config.loss == "dpo"):
        raise ValueError(
            f"the loss {config.loss!r} {'needs a' if config.loss == 'dpo' else 'has no'} reference"
        )
    means = PairValues(*(_wide(x) / n for x, n in zip(log_probs, n_tokens, strict=True)))
    if config.loss == "orpo":
        return orpo_loss(means, beta=config.beta)
    if config.loss == "simpo":
        assert config.gamma is not None
        return simpo_loss(means, beta=config.beta, gamma=config.gamma)
    assert reference is not None
    assert config.label_smoothing is not None
    assert config.chosen_weight is not None
    loss = dpo_loss(log_probs, reference, beta=config.beta, label_smoothing=config.label_smoothing)
    if config.chosen_weight:
        loss = loss._replace(losses=loss.losses - config.chosen_weight * means.chosen)
    return loss


def _log_odds(x: Tensor) -> Tensor:
    """``x - log(1 - exp(x))``; ``expm1`` keeps the digits of ``1 - exp(x)`` near 0."""
    x = x.clamp(max=_NEAREST_TO_ZERO)
    return x - torch.log(-torch.expm1(x))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
