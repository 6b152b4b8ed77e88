"""Losses on pairs, against closed forms of their values and derivatives in float64."""

import math

import numpy as np
import pytest
import torch

from rwkv_train.config.preference import PreferenceConfig
from rwkv_train.finetuning.preferences import (
    PairValues,
    dpo_loss,
    orpo_loss,
    preference_loss,
    sequence_log_probs,
    simpo_loss,
)

FLOAT32 = 1e-5
"""Relative: some additions of numbers of one size in float32."""
CHOSEN, REJECTED = [-12.5, -3.25, -40.0, -7.0], [-14.0, -2.5, -33.0, -7.5]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-13.0, -3.0, -36.0, -7.0], [-13.0, -3.0, -36.5, -7.25]
N_CHOSEN, N_REJECTED = [5, 2, 16, 3], [7, 1, 11, 4]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_values(chosen, rejected, **options):
    return PairValues(*(torch.tensor(x, **options) for x in (chosen, rejected)))


def gradients(loss, log_probs):
    return [x.numpy() for x in torch.autograd.grad(loss.losses.sum(), log_probs)]


def reference():
    return pair_values(REFERENCE_CHOSEN, REFERENCE_REJECTED)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chosen_weight", [0.0, 0.7])
def test_dpo_and_its_gradient_are_those_of_the_closed_form(label_smoothing, chosen_weight):
    config = PreferenceConfig(
        loss="dpo", beta=0.3, label_smoothing=label_smoothing, chosen_weight=chosen_weight
    )
    log_probs = pair_values(CHOSEN, REJECTED, requires_grad=True)
    loss = preference_loss(config, log_probs, pair_values(N_CHOSEN, N_REJECTED), reference())
    d_chosen, d_rejected = gradients(loss, log_probs)

    # The ratio of the paper: p = sigmoid(m) is the probability that chosen is preferred; dL/dm = p - (1 - e).
    margin = 0.3 * (np.array(CHOSEN) - REFERENCE_CHOSEN - (np.array(REJECTED) - np.array(REFERENCE_REJECTED)))
    preferred = sigmoid(margin)
    wanted = -(1 - label_smoothing) * np.log(preferred) - label_smoothing * np.log(1 - preferred)
    wanted -= chosen_weight * np.array(CHOSEN) / N_CHOSEN
    slope = 0.3 * (preferred - (1 - label_smoothing))
    np.testing.assert_allclose(loss.losses.detach(), wanted, rtol=FLOAT32)
    np.testing.assert_allclose(d_chosen, slope - chosen_weight / np.array(N_CHOSEN), rtol=FLOAT32)
    np.testing.assert_allclose(d_rejected, -slope, rtol=FLOAT32)
    np.testing.assert_allclose(loss.margins, margin, rtol=FLOAT32)


def test_orpo_and_its_gradient_are_those_of_the_closed_form():
    log_probs = pair_values(CHOSEN, REJECTED, requires_grad=True)
    n_tokens = pair_values(N_CHOSEN, N_REJECTED)
    loss = preference_loss(PreferenceConfig(loss="orpo", beta=0.4), log_probs, n_tokens)
    d_chosen, d_rejected = gradients(loss, log_probs)

    # With p = exp(mean), the odds ratio r: L = -log p_c + beta log(1 + 1 / r), d log odds / d log p = 1 / (1 - p).
    p_chosen = np.exp(np.array(CHOSEN) / N_CHOSEN)
    p_rejected = np.exp(np.array(REJECTED) / N_REJECTED)
    ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
    np.testing.assert_allclose(
        loss.losses.detach(), -np.log(p_chosen) + 0.4 * np.log(1 + 1 / ratio), rtol=FLOAT32
    )
    slope = -0.4 / (1 + ratio)
    np.testing.assert_allclose(d_chosen, (slope / (1 - p_chosen) - 1) / N_CHOSEN, rtol=FLOAT32)
    np.testing.assert_allclose(d_rejected, -slope / (1 - p_rejected) / N_REJECTED, rtol=FLOAT32)
    np.testing.assert_allclose(loss.chosen_rewards, 0.4 * np.log(p_chosen), rtol=FLOAT32)


def test_simpo_and_its_gradient_are_those_of_the_closed_form():
    log_probs = pair_values(CHOSEN, REJECTED, requires_grad=True)
    n_tokens = pair_values(N_CHOSEN, N_REJECTED)
    loss = preference_loss(PreferenceConfig(loss="simpo", beta=2.0, gamma=0.8), log_probs, n_tokens)
    d_chosen, d_rejected = gradients(loss, log_probs)

    rewards = 2 * np.array(CHOSEN) / N_CHOSEN, 2 * np.array(REJECTED) / N_REJECTED
    preferred = sigmoid(rewards[0] - rewards[1] - 0.8)
    np.testing.assert_allclose(loss.losses.detach(), -np.log(preferred), rtol=FLOAT32)
    np.testing.assert_allclose(d_chosen, 2 * (preferred - 1) / N_CHOSEN, rtol=FLOAT32)
    np.testing.assert_allclose(d_rejected, 2 * (1 - preferred) / N_REJECTED, rtol=FLOAT32)
    np.testing.assert_allclose(loss.chosen_rewards, rewards[0], rtol=FLOAT32)
    np.testing.assert_allclose(loss.rejected_rewards, rewards[1], rtol=FLOAT32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_model_that_is_its_own_reference_has_the_loss_log_2(label_smoothing):
    loss = dpo_loss(reference(), reference(), beta=0.1, label_smoothing=label_smoothing)
    assert loss.losses.tolist() == pytest.approx([math.log(2)] * 4)
    assert loss.accuracies.tolist() == [0.0] * 4


def test_answers_of_equal_probability_have_the_loss_log_2():
    same = pair_values([-1.5], [-1.5])
    assert float(simpo_loss(same, beta=2.0, gamma=0.0).losses) == pytest.approx(math.log(2))
    assert float(orpo_loss(same, beta=1.0).losses) == pytest.approx(1.5 + math.log(2))


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_large_margins_stay_finite_and_the_loss_is_linear_in_them(margin):
    log_probs = pair_values([margin], [0.0], requires_grad=True)
    loss = dpo_loss(log_probs, pair_values([0.0], [0.0]), beta=0.5)
    d_chosen, d_rejected = gradients(loss, log_probs)

    assert float(loss.losses.detach()) == max(0.0, -0.5 * margin)
    assert d_chosen == -d_rejected == (-0.5 if margin < 0 else 0.0)


@pytest.mark.parametrize("mean", [-1e-3, -1e-5, -1e-6])
def test_odds_of_a_probability_near_1_keep_their_digits(mean):
    log_probs = pair_values([mean], [-2.0], requires_grad=True)
    loss = orpo_loss(log_probs, beta=1.0)
    d_chosen, _ = gradients(loss, log_probs)

    # In float64: 1 - exp(x) from its series; the odds ratio is large, so that log(1 + 1 / r) is near 1 / r.
    x = float(np.float32(mean))
    rest = -x - x * x / 2 - x**3 / 6
    inverse = (math.exp(-2) / (1 - math.exp(-2))) * rest / math.exp(x)
    assert float(loss.losses.detach()) == pytest.approx(-x + math.log1p(inverse), rel=FLOAT32)
    assert float(d_chosen[0]) == pytest.approx(-1 - inverse / (1 + inverse) / rest, rel=FLOAT32)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (-1e-9, -1e3), (-1e3, -1e-9)])
def test_orpo_is_finite_where_an_answer_is_certain(chosen, rejected):
    log_probs = pair_values([chosen], [rejected], requires_grad=True)
    loss = orpo_loss(log_probs, beta=1.0)
    assert torch.isfinite(loss.losses).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients(loss, log_probs))


def test_rewards_margins_and_accuracies_are_of_each_pair():
    loss = dpo_loss(pair_values(CHOSEN, REJECTED), reference(), beta=0.5)
    assert loss.chosen_rewards.tolist() == [0.25, -0.125, -2.0, 0.0]
    assert loss.rejected_rewards.tolist() == [-0.5, 0.25, 1.75, -0.125]
    assert loss.margins.tolist() == [0.75, -0.375, -3.75, 0.125]
    assert loss.accuracies.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert not loss.chosen_rewards.requires_grad


def test_log_probabilities_in_bfloat16_give_a_loss_in_float32():
    values = pair_values([-1.0], [-2.0], dtype=torch.bfloat16)
    assert simpo_loss(values, beta=1.0, gamma=0.5).losses.dtype == torch.float32


@pytest.mark.parametrize(("name", "has_reference"), [("dpo", False), ("orpo", True), ("simpo", True)])
def test_a_reference_is_asked_for_where_it_has_a_use(name, has_reference):
    values = pair_values([-1.0], [-2.0])
    with pytest.raises(ValueError, match=f"the loss '{name}' .* reference"):
        preference_loss(PreferenceConfig(loss=name), values, values, values if has_reference else None)


def test_sums_of_a_packed_row_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(1, 12, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([[3, -100, 5, -100, -100, 1, 2, 0, -100, 4, -100, -100]])
    cu_seqlens = torch.tensor([0, 3, 5, 5, 8, 12])  # the second has no target, the third no token
    sums, counts = sequence_log_probs(losses, targets, cu_seqlens)

    wanted, wanted_counts = [0.0] * 5, [0] * 5
    for sequence in range(5):
        for position in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            if targets[0, position] != -100:
                wanted[sequence] -= float(losses[0, position].detach())
                wanted_counts[sequence] += 1
    assert sums.tolist() == pytest.approx(wanted, rel=1e-12)
    assert counts.tolist() == wanted_counts == [2, 0, 0, 3, 1]

    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    (d_losses,) = torch.autograd.grad((weights * sums).sum(), losses)
    assert d_losses.tolist() == [[-1, 0, -1, 0, 0, -4, -4, -4, 0, -5, 0, 0]]


def test_without_lengths_each_row_is_a_sequence():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, math.nan]], dtype=torch.bfloat16)
    targets = torch.tensor([[1, -100, 1], [1, 1, -100]])  # a loss that is not asked for may be anything
    sums, counts = sequence_log_probs(losses, targets, None)
    assert (sums.tolist(), counts.tolist()) == ([-5.0, -24.0], [2, 2])
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo"])
def test_no_value_is_read_into_python(name):
    # A tensor without values cannot be waited for: reading one raises.
    losses, targets = torch.empty(1, 12, device="meta"), torch.empty(1, 12, device="meta", dtype=torch.int64)
    sums, counts = sequence_log_probs(losses, targets, torch.empty(5, device="meta", dtype=torch.int64))
    log_probs, n_tokens = PairValues(sums[:2], sums[2:]), PairValues(counts[:2], counts[2:])
    reference = log_probs if name == "dpo" else None
    assert preference_loss(PreferenceConfig(loss=name), log_probs, n_tokens, reference).accuracies.shape == (
        2,
    )


@pytest.mark.parametrize(
    ("losses", "targets", "cu_seqlens", "message"),
    [
        ((1, 4), (1, 5), None, "must be"),
        ((4,), (4,), None, "must be"),
        ((2, 4), (2, 4), [0, 4], "must be alone, got 2"),
    ],
)
def test_shapes_that_disagree_are_refused(losses, targets, cu_seqlens, message):
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    with pytest.raises(ValueError, match=message):
        sequence_log_probs(torch.zeros(losses), torch.zeros(targets, dtype=torch.int64), cu_seqlens)
