import math

import numpy as np
import pytest

from rwkv_train.evaluation.bootstrap import N_REPLICATES, draws, interval
from rwkv_train.evaluation.comparison import differences
from rwkv_train.evaluation.report import Report
from rwkv_train.evaluation.totals import Totals

# Of a percentile: two bootstraps of 1000 replicates each move their 2.5 % points by about 0.1 standard errors.
ENDS = 0.35


def report_of(nats, n_bytes, domains=None):
    report = Report()
    for number, (x, n) in enumerate(zip(nats, n_bytes, strict=True)):
        domain = "d" if domains is None else domains[number]
        totals = Totals(1, int(n), int(n), 1, float(x))
        report.add(domain, totals, np.full(int(n), x / n), number=number)
    return report


def ordinary_bootstrap(statistic, n):
    """Draw n of n with replacement, from a list, as textbooks do."""
    random = np.random.default_rng(11)
    values = [statistic(random.integers(0, n, n)) for _ in range(2000)]
    return np.quantile(values, [0.025, 0.975]), np.std(values)


@pytest.fixture
def corpus():
    """Nats and bytes of 80 documents of very different length."""
    random = np.random.default_rng(3)
    n_bytes = np.ceil(np.exp(random.normal(5, 1, 80)))
    return n_bytes * random.gamma(20, 0.05, 80), n_bytes


def test_draws_are_poisson_numbers_of_mean_one():
    counts = np.concatenate([draws(number) for number in range(200)])
    for k in range(6):
        expected = math.exp(-1) / math.factorial(k)
        error = math.sqrt(expected / len(counts))
        assert (counts == k).mean() == pytest.approx(expected, abs=4 * error)


def test_draws_of_two_documents_have_nothing_to_do_with_each_other():
    table = np.stack([draws(number) for number in range(60)])
    correlations = np.corrcoef(table)[np.triu_indices(60, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(N_REPLICATES)
    assert correlations.mean() == pytest.approx(0, abs=4 / math.sqrt(N_REPLICATES * len(correlations)))


def test_intervals_are_those_of_an_ordinary_bootstrap(corpus):
    nats, n_bytes = corpus
    expected, error = ordinary_bootstrap(
        lambda rows: nats[rows].sum() / n_bytes[rows].sum() / math.log(2), len(nats)
    )
    sums = report_of(nats, n_bytes).pooled
    assert sums.bits_per_byte_interval == pytest.approx(tuple(expected), abs=ENDS * error)
    assert sums.bits_per_byte_interval[0] < sums.totals.bits_per_byte < sums.bits_per_byte_interval[1]
    # Here each token is a byte.
    assert sums.loss_interval == pytest.approx(tuple(expected * math.log(2)), abs=ENDS * error)


def test_an_interval_of_a_mean_has_the_width_that_its_formula_says():
    random = np.random.default_rng(8)
    nats = random.normal(100, 10, 400)
    low, high = report_of(nats, np.full(400, 10)).pooled.loss_interval
    # A mean of n documents of equal length: 2 * 1.96 standard errors.
    assert high - low == pytest.approx(2 * 1.96 * nats.std() / 10 / math.sqrt(400), rel=0.1)


def test_equal_documents_leave_nothing_open():
    low, high = report_of([6.0] * 30, [3] * 30).pooled.loss_interval
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(2.0)


def test_one_document_has_no_interval():
    sums = report_of([6.0], [3]).pooled
    assert sums.bits_per_byte_interval is None
    assert sums.loss_interval is None
    assert sums.to_json()["bits_per_byte_interval"] is None


def test_replicates_in_which_nothing_was_drawn_are_left_out():
    assert interval(np.array([np.nan, 1.0, 1.0]), 2) == (1.0, 1.0)
    low, high = report_of([6.0, 3.0], [3, 3]).pooled.loss_interval
    assert (low, high) == (
        1.0,
        2.0,
    )  # only the first, only the second: in more than 2.5 % of the replicates each


def test_reports_of_parts_add_up_to_that_of_the_whole(corpus):
    nats, n_bytes = corpus
    domains = ["a" if i % 3 else "b" for i in range(80)]
    whole = report_of(nats, n_bytes, domains)
    parts = [Report(), Report()]
    for number in reversed(range(80)):
        totals = Totals(1, int(n_bytes[number]), int(n_bytes[number]), 1, float(nats[number]))
        losses = np.full(totals.tokens, totals.nats / totals.tokens)
        parts[number % 2].add(domains[number], totals, losses, number=number)
    parts[0].merge(parts[1])

    assert list(parts[0].domains) == ["a", "b"]
    for domain, sums in whole.domains.items():
        merged = parts[0].domains[domain]
        assert merged.totals == pytest.approx(sums.totals)
        assert merged.bits_per_byte_interval == pytest.approx(sums.bits_per_byte_interval)
    assert parts[0].total == pytest.approx(whole.total)
    for curve, other in zip(parts[0].positions.curves(), whole.positions.curves(), strict=True):
        assert curve.documents == other.documents
        assert [b.loss for b in curve.buckets] == pytest.approx([b.loss for b in other.buckets])


def test_the_pooled_rate_is_of_the_sums_and_not_a_mean_of_rates():
    report = report_of([10.0, 270.0], [10, 30], ["a", "b"])
    assert report.total == (2, 40, 40, 2, 280.0)
    assert report.total.bits_per_byte == pytest.approx(280 / 40 / math.log(2))


def test_a_difference_is_paired(corpus):
    nats, n_bytes = corpus
    random = np.random.default_rng(4)
    better = nats - n_bytes * random.normal(0.01, 0.002, 80)
    first, other = report_of(nats, n_bytes), report_of(better, n_bytes)
    difference = differences(first, other, same_tokenizer=True)[None]

    expected, error = ordinary_bootstrap(
        lambda rows: (better - nats)[rows].sum() / n_bytes[rows].sum() / math.log(2), len(nats)
    )
    value, (low, high) = difference.bits_per_byte
    assert value == pytest.approx((better - nats).sum() / n_bytes.sum() / math.log(2))
    assert (low, high) == pytest.approx(tuple(expected), abs=ENDS * error)
    assert high < 0  # plain, although the intervals of the two overlap by far
    assert first.pooled.bits_per_byte_interval[0] < other.total.bits_per_byte
    assert difference.loss.value == pytest.approx(value * math.log(2))


def test_a_model_does_not_differ_from_itself(corpus):
    report = report_of(*corpus)
    assert differences(report, report, same_tokenizer=True)["d"].bits_per_byte == (0, (0, 0))


def test_losses_of_different_tokenizers_do_not_compare(corpus):
    report = report_of(*corpus)
    (by_byte, by_token) = differences(report, report, same_tokenizer=False)[None]
    assert by_byte is not None
    assert by_token is None


def test_reports_of_different_documents_are_not_compared(corpus):
    nats, n_bytes = corpus
    report = report_of(nats, n_bytes)
    with pytest.raises(ValueError, match="reports of different documents: 80 of"):
        differences(report, report_of(nats[1:], n_bytes[1:]), same_tokenizer=True)
    with pytest.raises(ValueError, match="reports of different domains: d and e"):
        differences(report, report_of(nats, n_bytes, ["e"] * 80), same_tokenizer=True)
