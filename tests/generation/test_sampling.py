import math

import numpy as np
import pytest
import torch

from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.generation.sampling import SamplingSettings, count_token, next_probabilities, sample

# float64 sums against float64 sums of the same numbers in another order.
ROUNDING = 1e-12


def random_logits(vocab_size=50, seed=0):
    return 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def no_counts(logits):
    return torch.zeros_like(logits)


def plain(**changes):
    return SamplingSettings(**({"temperature": 1.0, "top_p": 1.0} | changes))


def probabilities(logits, settings, counts=None):
    return next_probabilities(logits, settings, no_counts(logits) if counts is None else counts).numpy()


def expected_probabilities(logits, temperature=1.0, top_k=None, top_p=1.0):
    """The definition, token by token: walk down from the best one until k are taken or p is reached."""
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    best_first = sorted(range(len(weights)), key=lambda token: -weights[token])[:top_k]
    weight_of_best = sum(weights[token] for token in best_first)
    taken, share = [], 0.0
    for token in best_first:
        taken.append(token)
        share += weights[token] / weight_of_best
        if share >= top_p:
            break
    result = np.zeros(len(weights))
    for token in taken:
        result[token] = weights[token] / sum(weights[other] for other in taken)
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_distribution_is_that_of_the_definition(temperature, top_k, top_p):
    logits = random_logits()
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)

    expected = expected_probabilities(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(probabilities(logits, settings), expected, rtol=1e-10, atol=ROUNDING)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.9, 4)]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log2() * math.log(2)
    # 0.5, 0.75 and 0.875 would depend on the rounding of the softmax without this margin.
    settings = plain(top_p=top_p - 1e-6)
    assert np.count_nonzero(probabilities(logits, settings)) == kept


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}])
def test_every_limit_of_caution_takes_the_best_token(greedy):
    for seed in range(20):
        logits = random_logits(seed=seed)
        settings = SamplingSettings(**greedy)
        generator = torch.Generator().manual_seed(seed)
        best = int(np.argmax(logits.numpy()))
        assert sample(logits, settings, generator, no_counts(logits)) == best
        assert probabilities(logits, settings)[best] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_near_zero_approaches_the_best_token(temperature):
    logits = random_logits()
    result = probabilities(logits, plain(temperature=temperature))
    assert result[int(logits.argmax())] == pytest.approx(1)


def test_of_equal_tokens_the_lowest_ids_are_kept():
    result = probabilities(torch.zeros(10), plain(top_k=3))
    np.testing.assert_allclose(result, [1 / 3] * 3 + [0] * 7)


def test_very_large_logits_do_not_overflow():
    result = probabilities(torch.tensor([3e38, 2e38, -3e38]), plain())
    np.testing.assert_array_equal(result, [1, 0, 0])


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = random_logits(vocab_size=8, seed=3)
    settings = SamplingSettings(temperature=1.5, top_p=0.95)
    expected = expected_probabilities(logits, 1.5, None, 0.95)
    generator = torch.Generator().manual_seed(7)
    n_draws = 5000

    drawn = [sample(logits, settings, generator, no_counts(logits)) for _ in range(n_draws)]

    observed = np.bincount(drawn, minlength=8)
    assert not observed[expected == 0].any()
    possible = expected > 0
    chi_square = np.sum((observed - n_draws * expected)[possible] ** 2 / (n_draws * expected[possible]))
    # 99.9 % of all chi-square values with 7 degrees of freedom are below 24.3; the seed is fixed.
    assert chi_square < 24.3
    assert possible.sum() > 3


def test_the_same_seed_draws_the_same_tokens():
    logits = random_logits()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [sample(logits, plain(), generator, no_counts(logits)) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_penalties_lower_the_logits_of_counted_tokens():
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0])
    counts = torch.tensor([0.0, 1.0, 0.5, 3.0])
    settings = plain(presence_penalty=0.25, frequency_penalty=2.0)

    penalized = torch.tensor([1.0, 2.0 - 0.25 - 2.0, 3.0 - 0.25 - 1.0, 4.0 - 0.25 - 6.0])
    expected = torch.softmax(penalized.double(), dim=0)
    np.testing.assert_allclose(probabilities(logits, settings, counts), expected, rtol=1e-6)
    assert sample(logits, plain(temperature=0.0), torch.Generator(), counts) == 3
    greedy = plain(temperature=0.0, frequency_penalty=2.0, presence_penalty=0.25)
    assert sample(logits, greedy, torch.Generator(), counts) == 2


def test_counts_decay_with_each_token():
    settings = SamplingSettings(penalty_decay=0.5)
    counts = torch.zeros(4)
    for token in [1, 1, 3, 2]:
        counts = count_token(counts, token, settings)
    # By hand: 1 -> 1, 1.5, .75, .375; 3 -> 1, .5; 2 -> 1.
    assert counts.tolist() == [0, 0.375, 1, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [plain(), plain(temperature=0.0)], ids=["drawn", "greedy"])
def test_logits_that_are_not_numbers_are_refused(bad, settings):
    logits = random_logits()
    logits[7] = bad
    with pytest.raises(CheckpointError, match="not a finite number"):
        sample(logits, settings, torch.Generator(), no_counts(logits))


def test_logits_that_rule_out_every_token_are_refused():
    with pytest.raises(CheckpointError, match="-inf, not a finite number"):
        sample(torch.full((5,), -math.inf), plain(), torch.Generator(), torch.zeros(5))


def test_a_token_that_the_model_rules_out_is_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 0.0])
    np.testing.assert_array_equal(probabilities(logits, plain()), [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", math.nan, "a number of at least 0"),
        ("top_p", 1.1, "a number from 0 to 1"),
        ("top_p", -0.1, "a number from 0 to 1"),
        ("top_k", 0, "at least 1, or left out for no limit"),
        ("presence_penalty", math.inf, "a number"),
        ("frequency_penalty", math.nan, "a number"),
        ("penalty_decay", 1.5, "a number from 0 to 1"),
    ],
)
def test_a_setting_outside_its_range_is_refused(name, value, wanted):
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be {wanted}"):
        SamplingSettings(**{name: value})
