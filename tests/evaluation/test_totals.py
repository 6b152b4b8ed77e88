import doctest
import json
import math

import pytest
from lm_eval.api.task import ConfigurableTask

from rwkv_train.evaluation import totals as module
from rwkv_train.evaluation.totals import Totals, bits_per_byte, count_words


def test_rates_are_those_computed_by_hand():
    # 4 tokens of 2 bits each are 8 bits over 2 bytes.
    totals = Totals(documents=1, tokens=4, bytes=2, words=1, nats=8 * math.log(2))
    assert totals.loss == pytest.approx(2 * math.log(2))
    assert totals.word_ppl == pytest.approx(256)
    assert totals.token_ppl == pytest.approx(4)
    assert totals.byte_ppl == pytest.approx(16)
    assert totals.bits_per_byte == pytest.approx(4)


def test_totals_add_up():
    assert Totals(1, 2, 3, 4, 5.5) + Totals(10, 20, 30, 40, 50.0) == Totals(11, 22, 33, 44, 55.5)


def test_json_has_sums_and_rates():
    content = json.loads(json.dumps(Totals(1, 4, 2, 1, 8 * math.log(2)).to_json()))
    expected = {
        "documents": 1,
        "tokens": 4,
        "bytes": 2,
        "words": 1,
        "nats": 8 * math.log(2),
        "loss": 2 * math.log(2),
        "token_ppl": 4,
        "word_ppl": 256,
        "byte_ppl": 16,
        "bits_per_byte": 4,
    }
    assert list(content) == list(expected)
    assert list(content.values()) == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("text", ["", " two\twords ", "a\n\nb c", "ein\u00a0Wort\u3000mehr"])
def test_words_are_those_that_lm_evaluation_harness_counts(text):
    task = ConfigurableTask.__new__(ConfigurableTask)
    assert count_words(text) == task.count_words(text)


def test_a_rate_that_json_cannot_hold_is_null():
    content = Totals(1, 1, 1, 0, 5000.0).to_json()
    assert content["token_ppl"] is None
    assert content["bits_per_byte"] == pytest.approx(5000 / math.log(2))
    assert json.dumps(Totals().to_json(), allow_nan=False)


def test_there_is_no_rate_of_nothing():
    content = Totals(documents=1, tokens=0, bytes=3, words=1).to_json()
    rates = ("loss", "token_ppl", "word_ppl", "byte_ppl", "bits_per_byte")
    assert [content[name] for name in rates] == [None] * 5


@pytest.mark.parametrize("n_bytes", [0, -1])
def test_bits_per_byte_of_no_bytes_are_refused(n_bytes):
    with pytest.raises(ValueError, match=f"total_bytes is {n_bytes}; it must be positive"):
        bits_per_byte(1.0, n_bytes)


def test_the_examples_are_true():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
