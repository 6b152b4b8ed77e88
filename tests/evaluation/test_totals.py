import doctest
import json
import math

import pytest

from rwkv_train.evaluation import totals as module
from rwkv_train.evaluation.totals import Report, Totals, bits_per_byte


def test_rates_are_those_computed_by_hand():
    # 4 tokens of 2 bits each are 8 bits over 2 bytes.
    totals = Totals(documents=1, tokens=4, bytes=2, nats=8 * math.log(2))
    assert totals.token_ppl == pytest.approx(4)
    assert totals.byte_ppl == pytest.approx(16)
    assert totals.bits_per_byte == pytest.approx(4)


def test_totals_add_up():
    assert Totals(1, 2, 3, 4.5) + Totals(10, 20, 30, 40.0) == Totals(11, 22, 33, 44.5)


def test_the_pooled_rate_is_of_the_sums_and_not_a_mean_of_rates():
    report = Report({"a": Totals(1, 10, 10, 10.0), "b": Totals(1, 90, 30, 270.0)})
    assert report.total == Totals(2, 100, 40, 280.0)
    assert report.total.bits_per_byte == pytest.approx(280 / 40 / math.log(2))
    assert report.total.bits_per_byte != pytest.approx((1 + 9) / 2 / math.log(2))


def test_json_has_sums_and_rates_pooled_and_by_domain():
    content = json.loads(json.dumps(Report({"a": Totals(1, 4, 2, 8 * math.log(2))}).to_json()))
    assert set(content) == {"total", "domains"}
    assert content["domains"]["a"] == content["total"]
    names = ["documents", "tokens", "bytes", "nats", "token_ppl", "byte_ppl", "bits_per_byte"]
    assert list(content["total"]) == names
    assert list(content["total"].values()) == pytest.approx([1, 4, 2, 8 * math.log(2), 4, 16, 4])


def test_a_rate_that_json_cannot_hold_is_null():
    content = Totals(1, 1, 1, 5000.0).to_json()
    assert content["token_ppl"] is None
    assert content["bits_per_byte"] == pytest.approx(5000 / math.log(2))
    assert json.dumps(Totals().to_json(), allow_nan=False)


@pytest.mark.parametrize("n_bytes", [0, -1])
def test_bits_per_byte_of_no_bytes_are_refused(n_bytes):
    with pytest.raises(ValueError, match=f"total_bytes is {n_bytes}; it must be positive"):
        bits_per_byte(1.0, n_bytes)


def test_the_examples_are_true():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
